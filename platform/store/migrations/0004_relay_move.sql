-- +goose Up
ALTER TABLE nodes ADD COLUMN next_host TEXT NOT NULL DEFAULT ''; -- of a relay whose address will change
ALTER TABLE nodes ADD COLUMN next_from BIGINT; -- when it does
