-- +goose Up
-- What platforms that share this database tell each other here. Nothing of it matters when none runs.
CREATE TABLE replicas (
    id      TEXT PRIMARY KEY,
    address TEXT NOT NULL,
    started BIGINT NOT NULL,
    seen    BIGINT NOT NULL,
    streams INTEGER NOT NULL
);

CREATE TABLE replica_beats (
    node    TEXT PRIMARY KEY,
    replica TEXT NOT NULL,
    at      BIGINT NOT NULL,
    beat    TEXT NOT NULL -- JSON
);
CREATE INDEX replica_beats_at ON replica_beats (at);

CREATE TABLE leases (
    name    TEXT PRIMARY KEY,
    holder  TEXT NOT NULL,
    expires BIGINT NOT NULL
);

-- +goose Down
DROP TABLE leases;
DROP TABLE replica_beats;
DROP TABLE replicas;
