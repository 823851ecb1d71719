-- +goose Up
CREATE TABLE licences (
    org       TEXT PRIMARY KEY REFERENCES orgs (name) ON DELETE CASCADE,
    document  TEXT NOT NULL, -- signed
    id        TEXT NOT NULL, -- these are in the document, too
    issuer    TEXT NOT NULL,
    serial    BIGINT NOT NULL,
    bandwidth BIGINT NOT NULL, -- bytes per second, 0 is no limit
    expires   BIGINT NOT NULL,
    source    TEXT NOT NULL,
    installed BIGINT NOT NULL,
    warned    INTEGER NOT NULL -- days before the end for which a warning was written last; -1 is that of the end
);

-- The highest serial number that an organization of this name ever had of an issuer: a lower one does not come back, also not after the licence was
-- removed or the organization made anew.
CREATE TABLE licence_serials (
    org    TEXT NOT NULL,
    issuer TEXT NOT NULL,
    serial BIGINT NOT NULL,
    PRIMARY KEY (org, issuer)
);

-- +goose Down
DROP TABLE licence_serials;
DROP TABLE licences;
