-- +goose Up
ALTER TABLE orgs ADD COLUMN direct BOOLEAN NOT NULL DEFAULT TRUE; -- whether sessions may leave the relay
ALTER TABLE orgs ADD COLUMN direct_private BOOLEAN NOT NULL DEFAULT FALSE; -- whether nodes tell each other private addresses for that
