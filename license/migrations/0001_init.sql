-- +goose Up
-- Times are microseconds since 1970 UTC.
CREATE TABLE update_turns (
    turn INTEGER -- never has a row: transactions that write lock it in turns
);

CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value BLOB NOT NULL
);

CREATE TABLE customers (
    name    TEXT PRIMARY KEY,
    contact TEXT NOT NULL, -- whom a customer asks for more, in every licence
    created BIGINT NOT NULL
);

-- Licence keys: credentials by which a customer's platforms fetch.
CREATE TABLE licence_keys (
    id       TEXT PRIMARY KEY,
    customer TEXT NOT NULL REFERENCES customers (name),
    hash     TEXT NOT NULL UNIQUE, -- SHA-256
    name     TEXT NOT NULL,
    created  BIGINT NOT NULL,
    revoked  BIGINT,
    used     BIGINT -- last time
);

CREATE TABLE admin_tokens (
    id      TEXT PRIMARY KEY,
    hash    TEXT NOT NULL UNIQUE, -- SHA-256
    name    TEXT NOT NULL,
    created BIGINT NOT NULL,
    expires BIGINT,
    revoked BIGINT
);

CREATE TABLE signing_keys (
    id      TEXT PRIMARY KEY,
    public  TEXT NOT NULL,
    state   TEXT NOT NULL, -- current, next, old
    created BIGINT NOT NULL
);

CREATE TABLE entitlements (
    id           TEXT PRIMARY KEY,
    serial       BIGINT NOT NULL UNIQUE,
    customer     TEXT NOT NULL REFERENCES customers (name),
    platform     TEXT NOT NULL,
    organization TEXT NOT NULL,
    document     TEXT NOT NULL, -- signed
    signer       TEXT NOT NULL,
    issued       BIGINT NOT NULL,
    state        TEXT NOT NULL -- current, revoked (and the newest of its place), replaced
);
CREATE INDEX entitlements_place ON entitlements (customer, organization, platform);

CREATE TABLE audit (
    seq    BIGINT PRIMARY KEY,
    at     BIGINT NOT NULL,
    actor  TEXT NOT NULL,
    action TEXT NOT NULL,
    object TEXT NOT NULL,
    detail TEXT NOT NULL, -- JSON, as it was hashed
    hash   TEXT NOT NULL  -- SHA-256 over the hash before and this entry
);

-- +goose Down
DROP TABLE audit;
DROP TABLE entitlements;
DROP TABLE signing_keys;
DROP TABLE admin_tokens;
DROP TABLE licence_keys;
DROP TABLE customers;
DROP TABLE meta;
DROP TABLE update_turns;
