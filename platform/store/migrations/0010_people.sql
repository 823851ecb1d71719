-- +goose Up
-- People, their roles, logins and tokens. Hashes are hexadecimal SHA-256, sealed values base64. An org of platform.shared is the platform
-- itself: a role there holds in every organization.
CREATE TABLE people (
    id               TEXT PRIMARY KEY,
    org              TEXT NOT NULL REFERENCES orgs (name) ON DELETE CASCADE, -- whose owners manage the account
    login            TEXT NOT NULL UNIQUE, -- lower case
    name             TEXT NOT NULL,
    email            TEXT NOT NULL,
    password         TEXT NOT NULL, -- argon2id with its parameters, '' is none
    password_changed BIGINT,
    totp             TEXT NOT NULL, -- sealed secret, '' is none
    totp_step        BIGINT NOT NULL, -- of the newest code that was used
    disabled         BOOLEAN NOT NULL,
    created          BIGINT NOT NULL,
    last_login       BIGINT
);
CREATE INDEX people_org ON people (org);

CREATE TABLE people_roles (
    person  TEXT NOT NULL REFERENCES people (id) ON DELETE CASCADE,
    org     TEXT NOT NULL REFERENCES orgs (name) ON DELETE CASCADE,
    role    TEXT NOT NULL, -- owner, admin, auditor, member
    created BIGINT NOT NULL,
    PRIMARY KEY (person, org)
);
CREATE INDEX people_roles_org ON people_roles (org);

CREATE TABLE people_recovery (
    person TEXT NOT NULL REFERENCES people (id) ON DELETE CASCADE,
    hash   TEXT NOT NULL,
    PRIMARY KEY (person, hash)
);

CREATE TABLE people_sessions (
    id       TEXT PRIMARY KEY,
    hash     TEXT NOT NULL UNIQUE, -- of the cookie
    person   TEXT NOT NULL REFERENCES people (id) ON DELETE CASCADE,
    created  BIGINT NOT NULL,
    seen     BIGINT NOT NULL,
    expires  BIGINT NOT NULL,
    source   TEXT NOT NULL,
    agent    TEXT NOT NULL,
    provider TEXT NOT NULL -- of single sign-on, '' is a password
);
CREATE INDEX people_sessions_person ON people_sessions (person);

CREATE TABLE people_tickets (
    hash    TEXT PRIMARY KEY,
    kind    TEXT NOT NULL,
    subject TEXT NOT NULL,
    data    TEXT NOT NULL,
    created BIGINT NOT NULL,
    expires BIGINT NOT NULL
);
CREATE INDEX people_tickets_subject ON people_tickets (kind, subject);

CREATE TABLE people_devices (
    hash      TEXT PRIMARY KEY, -- of the device code
    user_code TEXT NOT NULL UNIQUE, -- its hash
    state     TEXT NOT NULL, -- pending, approved, denied
    person    TEXT REFERENCES people (id) ON DELETE CASCADE,
    client    TEXT NOT NULL,
    source    TEXT NOT NULL,
    created   BIGINT NOT NULL,
    expires   BIGINT NOT NULL,
    polled    BIGINT
);

CREATE TABLE oidc_providers (
    id        TEXT PRIMARY KEY,
    org       TEXT NOT NULL REFERENCES orgs (name) ON DELETE CASCADE,
    name      TEXT NOT NULL,
    issuer    TEXT NOT NULL,
    client_id TEXT NOT NULL,
    secret    TEXT NOT NULL, -- sealed
    settings  TEXT NOT NULL, -- JSON
    disabled  BOOLEAN NOT NULL,
    created   BIGINT NOT NULL,
    UNIQUE (org, name)
);

CREATE TABLE people_identities (
    provider TEXT NOT NULL REFERENCES oidc_providers (id) ON DELETE CASCADE,
    subject  TEXT NOT NULL,
    person   TEXT NOT NULL REFERENCES people (id) ON DELETE CASCADE,
    email    TEXT NOT NULL,
    created  BIGINT NOT NULL,
    PRIMARY KEY (provider, subject)
);
CREATE INDEX people_identities_person ON people_identities (person);

CREATE TABLE service_accounts (
    id       TEXT PRIMARY KEY,
    org      TEXT NOT NULL REFERENCES orgs (name) ON DELETE CASCADE,
    name     TEXT NOT NULL,
    scopes   TEXT NOT NULL, -- JSON
    disabled BOOLEAN NOT NULL,
    created  BIGINT NOT NULL,
    creator  TEXT NOT NULL,
    UNIQUE (org, name)
);

CREATE TABLE access_tokens (
    id        TEXT PRIMARY KEY,
    hash      TEXT NOT NULL UNIQUE,
    person    TEXT REFERENCES people (id) ON DELETE CASCADE,
    account   TEXT REFERENCES service_accounts (id) ON DELETE CASCADE,
    name      TEXT NOT NULL,
    scopes    TEXT NOT NULL, -- JSON
    created   BIGINT NOT NULL,
    expires   BIGINT,
    revoked   BIGINT,
    last_used BIGINT,
    source    TEXT NOT NULL
);
CREATE INDEX access_tokens_person ON access_tokens (person);
CREATE INDEX access_tokens_account ON access_tokens (account);

CREATE TABLE node_people (
    node   TEXT PRIMARY KEY REFERENCES nodes (id) ON DELETE CASCADE,
    person TEXT NOT NULL REFERENCES people (id) ON DELETE CASCADE
);
CREATE INDEX node_people_person ON node_people (person);

CREATE TABLE group_people (
    group_id TEXT NOT NULL REFERENCES groups (id) ON DELETE CASCADE,
    person   TEXT NOT NULL REFERENCES people (id) ON DELETE CASCADE,
    PRIMARY KEY (group_id, person)
);

-- +goose Down
DROP TABLE group_people;
DROP TABLE node_people;
DROP TABLE access_tokens;
DROP TABLE service_accounts;
DROP TABLE people_identities;
DROP TABLE oidc_providers;
DROP TABLE people_devices;
DROP TABLE people_tickets;
DROP TABLE people_sessions;
DROP TABLE people_recovery;
DROP TABLE people_roles;
DROP TABLE people;
