-- +goose Up
ALTER TABLE orgs ADD COLUMN direct INTEGER NOT NULL DEFAULT 1; -- whether sessions may leave the relay
ALTER TABLE orgs ADD COLUMN direct_private INTEGER NOT NULL DEFAULT 0; -- whether nodes tell each other private addresses for that
