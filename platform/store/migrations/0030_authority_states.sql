-- +goose Up
-- What a CA is for now: requested (its certificate is to be signed by the owner of an offline root), next (pinned, issues nothing yet), current,
-- retiring (pinned, issues nothing any more), gone (its key is erased). Before there were states each kind had one CA, which issued.
ALTER TABLE authorities ADD COLUMN state TEXT NOT NULL DEFAULT 'current';
ALTER TABLE authorities ADD COLUMN since BIGINT; -- of the state
ALTER TABLE authorities ADD COLUMN until BIGINT; -- when the last certificate by one that retires has ended
ALTER TABLE authorities ADD COLUMN announced TEXT NOT NULL DEFAULT '{}'; -- JSON: by organization, the version of its configuration that pins it first
CREATE INDEX authorities_state ON authorities (state);
