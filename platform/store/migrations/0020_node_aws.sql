-- +goose Up
-- Nodes that enrol by the AWS identity of their host, and which identities may. A node without a row enrols by token.
CREATE TABLE node_aws (
    node       TEXT PRIMARY KEY REFERENCES nodes (id) ON DELETE CASCADE,
    accounts   TEXT NOT NULL,
    principals TEXT NOT NULL
);

-- +goose Down
DROP TABLE node_aws;
