-- +goose Up
-- Every enrolment asks which keys are denied: few, among all that there are.
CREATE INDEX node_keys_denied ON node_keys (not_after) WHERE denied;
CREATE INDEX nodes_gone ON nodes (org) WHERE status <> 'active' OR deleted IS NOT NULL;

-- +goose Down
DROP INDEX nodes_gone;
DROP INDEX node_keys_denied;
