-- +goose Up
-- The flow log: a row for each connection, as its gateway reported it. Names are those of then, so that a row outlives what it names.
CREATE TABLE flows (
    gateway      TEXT NOT NULL, -- id
    id           TEXT NOT NULL, -- the gateway's
    org          TEXT NOT NULL REFERENCES orgs (name) ON DELETE CASCADE,
    gateway_name TEXT NOT NULL,
    client       TEXT NOT NULL, -- id
    client_name  TEXT NOT NULL,
    person       TEXT NOT NULL, -- id, '' is nobody's client
    login        TEXT NOT NULL,
    resource     TEXT NOT NULL, -- id
    resource_name TEXT NOT NULL,
    rule         TEXT NOT NULL,
    protocol     TEXT NOT NULL,
    destination  TEXT NOT NULL, -- as the client named it
    address      TEXT NOT NULL, -- that was dialled
    relay        TEXT NOT NULL, -- name, '' is none
    path         TEXT NOT NULL,
    started      BIGINT NOT NULL,
    seen         BIGINT NOT NULL, -- its end, or the newest report while it is open
    open         BOOLEAN NOT NULL,
    sent         BIGINT NOT NULL, -- bytes to the resource
    received     BIGINT NOT NULL, -- bytes from it
    reason       TEXT NOT NULL, -- why it ended
    PRIMARY KEY (gateway, id)
);
CREATE INDEX flows_org ON flows (org, started, id);
CREATE INDEX flows_client ON flows (org, client, started);
CREATE INDEX flows_resource ON flows (org, resource, started);
CREATE INDEX flows_seen ON flows (seen);

-- Organizations that keep none. A row means off.
CREATE TABLE flow_log_off (
    org TEXT PRIMARY KEY REFERENCES orgs (name) ON DELETE CASCADE
);

-- +goose Down
DROP TABLE flow_log_off;
DROP TABLE flows;
