-- +goose Up
-- Which ends of certificates have been warned of, so that each threshold is told once. A certificate is named by its kind and key or file.
CREATE TABLE expiry_warnings (
    org     TEXT NOT NULL REFERENCES orgs (name) ON DELETE CASCADE,
    subject TEXT NOT NULL,
    ends    BIGINT NOT NULL,
    days    INTEGER NOT NULL, -- the lowest threshold that was told
    PRIMARY KEY (org, subject)
);

-- +goose Down
DROP TABLE expiry_warnings;
