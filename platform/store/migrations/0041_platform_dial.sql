-- +goose Up
ALTER TABLE orgs ADD COLUMN platform_dial BOOLEAN NOT NULL DEFAULT TRUE; -- whether the platform may dial gateways of the organization

-- Keys for which the platform has issued itself certificates to dial gateways. The keys themselves are in the memory of its processes.
CREATE TABLE platform_keys (
    hash      TEXT PRIMARY KEY,
    org       TEXT NOT NULL REFERENCES orgs (name) ON DELETE CASCADE,
    node      TEXT NOT NULL,
    not_after BIGINT NOT NULL,
    denied    BOOLEAN NOT NULL DEFAULT FALSE
);
CREATE INDEX platform_keys_org ON platform_keys (org);

-- +goose Down
DROP TABLE platform_keys;
ALTER TABLE orgs DROP COLUMN platform_dial;
