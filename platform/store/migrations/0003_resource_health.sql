-- +goose Up
ALTER TABLE resources ADD COLUMN health TEXT NOT NULL DEFAULT ''; -- KIND[:PORT][/PATH], '' is the default probe
ALTER TABLE resource_gateways ADD COLUMN weight INTEGER NOT NULL DEFAULT 1;
ALTER TABLE resource_gateways ADD COLUMN position INTEGER NOT NULL DEFAULT 0; -- among those of one priority
