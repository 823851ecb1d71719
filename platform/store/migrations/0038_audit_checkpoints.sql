-- +goose Up
-- Signed heads of the audit chains. They outlive their organization as the chain does, so they refer to nothing.
CREATE TABLE audit_keys (
    id        TEXT PRIMARY KEY, -- key hash
    org       TEXT NOT NULL,
    chain     TEXT NOT NULL, -- certificates (PEM), the key's own first
    sealed    TEXT NOT NULL, -- private key, base64; '' when it signs no more
    created   BIGINT NOT NULL,
    not_after BIGINT NOT NULL
);
CREATE INDEX audit_keys_org ON audit_keys (org);

CREATE TABLE audit_checkpoints (
    org       TEXT NOT NULL,
    seq       BIGINT NOT NULL,
    hash      TEXT NOT NULL,
    at        BIGINT NOT NULL,
    key_id    TEXT NOT NULL,
    signature TEXT NOT NULL, -- base64
    PRIMARY KEY (org, seq)
);

-- How far what reads along the chains has got.
CREATE TABLE audit_cursors (
    sink TEXT NOT NULL,
    org  TEXT NOT NULL,
    seq  BIGINT NOT NULL,
    PRIMARY KEY (sink, org)
);

CREATE TABLE audit_sinks (
    sink    TEXT PRIMARY KEY,
    success BIGINT, -- when something was delivered last
    failed  BIGINT, -- since when it has failed; NULL is not
    problem TEXT NOT NULL
);

-- +goose Down
DROP TABLE audit_sinks;
DROP TABLE audit_cursors;
DROP TABLE audit_checkpoints;
DROP TABLE audit_keys;
