-- +goose Up
CREATE TABLE webhooks (
    id       TEXT PRIMARY KEY,
    org      TEXT NOT NULL REFERENCES orgs (name) ON DELETE CASCADE,
    name     TEXT NOT NULL,
    url      TEXT NOT NULL,
    events   TEXT NOT NULL, -- JSON, patterns of actions
    secret   TEXT NOT NULL, -- sealed, base64
    gateways BOOLEAN NOT NULL, -- dialled through the organization's gateways
    disabled TEXT NOT NULL, -- why, '' is not
    created  BIGINT NOT NULL,
    cursor   BIGINT NOT NULL, -- of the last entry that is done
    success  BIGINT, -- when something was delivered last
    failed   BIGINT, -- since when it has failed; NULL is not
    tries    BIGINT NOT NULL, -- that failed in a row
    next_try BIGINT NOT NULL,
    problem  TEXT NOT NULL,
    UNIQUE (org, name)
);

-- +goose Down
DROP TABLE webhooks;
