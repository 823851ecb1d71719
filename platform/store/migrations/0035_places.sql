-- +goose Up
-- Where nodes are (relays: with what they may fail together) and which relays gateways and clients are to have. Lists are ids of relays. A node
-- without a row wishes nothing.
CREATE TABLE node_wishes (
    node           TEXT PRIMARY KEY REFERENCES nodes (id) ON DELETE CASCADE,
    region         TEXT NOT NULL,
    failure_domain TEXT NOT NULL,
    pin            TEXT NOT NULL,
    exclude        TEXT NOT NULL,
    prefer         TEXT NOT NULL
);
-- The region of the deployment that an organization belongs to, and the regions whose shared relays its nodes may use: an empty list is all.
CREATE TABLE org_regions (
    org    TEXT PRIMARY KEY REFERENCES orgs (name) ON DELETE CASCADE,
    region TEXT NOT NULL,
    relays TEXT NOT NULL
);

-- +goose Down
DROP TABLE org_regions;
DROP TABLE node_wishes;
