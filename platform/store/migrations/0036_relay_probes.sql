-- +goose Up
-- What the platform found when it tried relays from outside, newest alone; found is JSON.
CREATE TABLE relay_probes (
    relay TEXT PRIMARY KEY REFERENCES nodes (id) ON DELETE CASCADE,
    at    BIGINT NOT NULL,
    found TEXT NOT NULL
);

-- +goose Down
DROP TABLE relay_probes;
