-- +goose Up
-- Times are microseconds since 1970 UTC. The row of orgs that is named platform.shared stands for the platform itself: relays that
-- organizations share, their CA, and the audit chain of what concerns no single organization.
CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value BLOB NOT NULL
);

CREATE TABLE orgs (
    name         TEXT PRIMARY KEY,
    range4       TEXT NOT NULL,
    range6       TEXT NOT NULL,
    created      BIGINT NOT NULL,
    version      BIGINT NOT NULL, -- of the configuration; only grows
    next_address BIGINT NOT NULL  -- index into both ranges
);

CREATE TABLE authorities (
    org         TEXT NOT NULL REFERENCES orgs (name) ON DELETE CASCADE,
    kind        TEXT NOT NULL, -- root, tls, or the kind of leaf that it issues
    generation  INTEGER NOT NULL,
    certificate BLOB NOT NULL, -- DER
    key         BLOB NOT NULL, -- sealed under the master key
    created     BIGINT NOT NULL,
    PRIMARY KEY (org, kind, generation)
);

CREATE TABLE nodes (
    id        TEXT PRIMARY KEY,
    org       TEXT NOT NULL REFERENCES orgs (name) ON DELETE CASCADE,
    kind      TEXT NOT NULL,
    name      TEXT NOT NULL,
    status    TEXT NOT NULL, -- active, disabled, revoked
    host      TEXT NOT NULL,
    port      INTEGER NOT NULL,
    peers     TEXT NOT NULL, -- JSON
    draining  BOOLEAN NOT NULL,
    address   BIGINT NOT NULL, -- index into the organization's ranges, 0 is none
    enrolment INTEGER NOT NULL, -- how often it has enrolled
    version   TEXT NOT NULL,
    created   BIGINT NOT NULL,
    enrolled  BIGINT,
    last_seen BIGINT,
    deleted   BIGINT -- a deleted node is kept while one of its certificates could still be valid
);
CREATE UNIQUE INDEX nodes_name ON nodes (org, kind, name) WHERE deleted IS NULL;

CREATE TABLE node_keys (
    hash      TEXT PRIMARY KEY, -- SHA-256 of the SPKI
    node      TEXT NOT NULL REFERENCES nodes (id) ON DELETE CASCADE,
    public    BLOB NOT NULL,
    enrolment INTEGER NOT NULL,
    created   BIGINT NOT NULL,
    not_after BIGINT NOT NULL, -- of the newest leaf of this key
    denied    BOOLEAN NOT NULL
);
CREATE INDEX node_keys_node ON node_keys (node);

CREATE TABLE enrolment_tokens (
    hash    BLOB PRIMARY KEY, -- SHA-256 of the secret
    node    TEXT NOT NULL REFERENCES nodes (id) ON DELETE CASCADE,
    org     TEXT NOT NULL,
    kind    TEXT NOT NULL,
    created BIGINT NOT NULL,
    expires BIGINT NOT NULL,
    used_at BIGINT
);

CREATE TABLE assertions (
    jti     BLOB PRIMARY KEY, -- SHA-256 of node and jti
    expires BIGINT NOT NULL
);

CREATE TABLE resources (
    id       TEXT PRIMARY KEY,
    org      TEXT NOT NULL REFERENCES orgs (name) ON DELETE CASCADE,
    name     TEXT NOT NULL,
    target   TEXT NOT NULL, -- address, CIDR or host name
    tcp      TEXT NOT NULL, -- JSON
    udp      TEXT NOT NULL, -- JSON
    icmp     BOOLEAN NOT NULL,
    domains  TEXT NOT NULL, -- JSON
    address  BIGINT NOT NULL,
    disabled BOOLEAN NOT NULL,
    created  BIGINT NOT NULL,
    UNIQUE (org, name)
);

CREATE TABLE resource_gateways (
    resource TEXT NOT NULL REFERENCES resources (id) ON DELETE CASCADE,
    gateway  TEXT NOT NULL REFERENCES nodes (id) ON DELETE CASCADE,
    priority INTEGER NOT NULL,
    PRIMARY KEY (resource, gateway)
);

CREATE TABLE groups (
    id      TEXT PRIMARY KEY,
    org     TEXT NOT NULL REFERENCES orgs (name) ON DELETE CASCADE,
    name    TEXT NOT NULL,
    created BIGINT NOT NULL,
    UNIQUE (org, name)
);

CREATE TABLE group_members (
    group_id TEXT NOT NULL REFERENCES groups (id) ON DELETE CASCADE,
    node     TEXT NOT NULL REFERENCES nodes (id) ON DELETE CASCADE,
    PRIMARY KEY (group_id, node)
);

CREATE TABLE policies (
    id           TEXT PRIMARY KEY,
    org          TEXT NOT NULL REFERENCES orgs (name) ON DELETE CASCADE,
    name         TEXT NOT NULL,
    subject_kind TEXT NOT NULL, -- client, gateway, group
    subject      TEXT NOT NULL, -- id
    resource     TEXT NOT NULL REFERENCES resources (id) ON DELETE CASCADE,
    disabled     BOOLEAN NOT NULL,
    created      BIGINT NOT NULL,
    UNIQUE (org, name)
);

CREATE TABLE relay_assignments (
    gateway  TEXT NOT NULL REFERENCES nodes (id) ON DELETE CASCADE,
    relay    TEXT NOT NULL REFERENCES nodes (id) ON DELETE CASCADE,
    position INTEGER NOT NULL, -- 0 is the active one
    PRIMARY KEY (gateway, position)
);

CREATE TABLE relay_keys (
    relay   TEXT NOT NULL REFERENCES nodes (id) ON DELETE CASCADE,
    id      TEXT NOT NULL,
    secret  BLOB NOT NULL, -- sealed
    created BIGINT NOT NULL,
    PRIMARY KEY (relay, id)
);

CREATE TABLE session_ends (
    org    TEXT NOT NULL REFERENCES orgs (name) ON DELETE CASCADE,
    node   TEXT NOT NULL,
    before BIGINT NOT NULL,
    PRIMARY KEY (org, node)
);

CREATE TABLE api_tokens (
    id      TEXT PRIMARY KEY,
    hash    BLOB NOT NULL UNIQUE, -- SHA-256 of the token
    name    TEXT NOT NULL,
    org     TEXT REFERENCES orgs (name) ON DELETE CASCADE, -- NULL is every organization
    scope   TEXT NOT NULL, -- admin, read-only
    created BIGINT NOT NULL,
    expires BIGINT,
    revoked BIGINT
);

-- The audit chain outlives its organization, so it refers to nothing.
CREATE TABLE audit (
    org    TEXT NOT NULL,
    seq    BIGINT NOT NULL,
    at     BIGINT NOT NULL,
    actor  TEXT NOT NULL,
    action TEXT NOT NULL,
    object TEXT NOT NULL,
    result TEXT NOT NULL,
    detail TEXT NOT NULL, -- JSON
    hash   TEXT NOT NULL,
    PRIMARY KEY (org, seq)
);

CREATE TABLE audit_heads (
    org  TEXT PRIMARY KEY,
    seq  BIGINT NOT NULL,
    hash TEXT NOT NULL
);

-- +goose Down
DROP TABLE audit_heads;
DROP TABLE audit;
DROP TABLE api_tokens;
DROP TABLE session_ends;
DROP TABLE relay_keys;
DROP TABLE relay_assignments;
DROP TABLE policies;
DROP TABLE group_members;
DROP TABLE groups;
DROP TABLE resource_gateways;
DROP TABLE resources;
DROP TABLE assertions;
DROP TABLE enrolment_tokens;
DROP TABLE node_keys;
DROP TABLE nodes;
DROP TABLE authorities;
DROP TABLE orgs;
DROP TABLE meta;
