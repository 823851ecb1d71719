-- +goose Up
-- Never has a row: transactions that write lock it in turns, see beginPostgres.
CREATE TABLE update_turns (
    turn INTEGER
);

-- +goose Down
DROP TABLE update_turns;
