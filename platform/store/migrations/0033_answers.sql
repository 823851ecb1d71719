-- +goose Up
-- What requests with an idempotency key did, and what they were answered. id is a hash of who asked and the key; sealed holds a hash of the
-- request and, once done, the answer. A row is written in the transaction of the effect.
CREATE TABLE answers (
    id      BLOB PRIMARY KEY,
    sealed  BLOB NOT NULL,
    done    BOOLEAN NOT NULL,
    created BIGINT NOT NULL,
    expires BIGINT NOT NULL
);
CREATE INDEX answers_by_expiry ON answers (expires);

-- +goose Down
DROP TABLE answers;
