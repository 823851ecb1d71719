package store

import (
	"context"
	"time"
)

// Answer is what a request with an idempotency key did.
type Answer struct {
	ID               [32]byte // hash of who asked, and of the key
	Sealed           []byte   // what the request was and, when Done, its answer
	Done             bool     // the answer is known
	Created, Expires time.Time
}

func scanAnswer(r row) (*Answer, error) {
	var a Answer
	var id []byte
	err := r.Scan(&id, &a.Sealed, &a.Done, stamp{&a.Created}, stamp{&a.Expires})
	copy(a.ID[:], id)
	return &a, err
}

func (t *sqlTx) InsertAnswer(ctx context.Context, a *Answer) error {
	if err := t.exec(ctx, false, `DELETE FROM answers WHERE id = ? AND expires < ?`, a.ID[:], micros(a.Created)); err != nil {
		return err
	}
	return t.insert(ctx, `INSERT INTO answers (id, sealed, done, created, expires) VALUES (?, ?, ?, ?, ?)`, a.ID[:], a.Sealed, a.Done, micros(a.Created), micros(a.Expires))
}

func (t *sqlTx) Answer(ctx context.Context, id [32]byte, now time.Time) (*Answer, error) {
	return one(ctx, t, scanAnswer, `SELECT id, sealed, done, created, expires FROM answers WHERE id = ? AND expires >= ?`, id[:], micros(now))
}

func (t *sqlTx) FinishAnswer(ctx context.Context, id [32]byte, sealed []byte) error {
	return t.exec(ctx, true, `UPDATE answers SET sealed = ?, done = TRUE WHERE id = ?`, sealed, id[:])
}
