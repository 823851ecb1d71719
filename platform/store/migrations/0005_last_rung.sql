-- +goose Up
-- The last rung of relays: SSH and TLS ports that nodes are told to dial, 0 is none. A relay whose software has no last rung has no row.
CREATE TABLE relay_rungs (
    relay    TEXT PRIMARY KEY REFERENCES nodes (id) ON DELETE CASCADE,
    ssh_port INTEGER NOT NULL,
    tls_port INTEGER NOT NULL
);

-- +goose Down
DROP TABLE relay_rungs;
