package store

import (
	"bytes"
	"context"
	"errors"
	"testing"
	"time"
)

func testAnswers(t *testing.T, s Store) {
	a := &Answer{ID: [32]byte{7}, Sealed: []byte("request"), Created: at, Expires: at.Add(time.Hour)}
	update(t, s, func(ctx context.Context, tx Tx) error {
		is(t, "answer to nothing", tx.FinishAnswer(ctx, a.ID, nil), ErrNotFound)
		return tx.InsertAnswer(ctx, a)
	})
	// Undone with what it belongs to.
	other := &Answer{ID: [32]byte{8}, Sealed: []byte("request"), Created: at, Expires: at.Add(time.Hour)}
	undo := errors.New("undo")
	if err := s.Update(t.Context(), func(tx Tx) error { return errors.Join(tx.InsertAnswer(t.Context(), other), undo) }); !errors.Is(err, undo) {
		t.Error(err)
	}
	update(t, s, func(ctx context.Context, tx Tx) error {
		is(t, "a second request", tx.InsertAnswer(ctx, a), ErrExists)
		_, err := tx.Answer(ctx, other.ID, at)
		is(t, "what was undone", err, ErrNotFound)
		if got, err := tx.Answer(ctx, a.ID, at); err != nil || got.Done || string(got.Sealed) != "request" || got.ID != a.ID || !got.Created.Equal(at) || !got.Expires.Equal(a.Expires) {
			t.Errorf("%+v, %v", got, err)
		}
		if err := tx.FinishAnswer(ctx, a.ID, []byte("answer")); err != nil {
			return err
		}
		if got, err := tx.Answer(ctx, a.ID, at); err != nil || !got.Done || !bytes.Equal(got.Sealed, []byte("answer")) {
			t.Errorf("%+v, %v", got, err)
		}
		// Past its time it is as if it had never been, even before it is purged.
		_, err = tx.Answer(ctx, a.ID, at.Add(2*time.Hour))
		is(t, "expired", err, ErrNotFound)
		again := *a
		again.Created, again.Expires = at.Add(2*time.Hour), at.Add(3*time.Hour)
		if err := tx.InsertAnswer(ctx, &again); err != nil {
			return err
		}
		if err := tx.Purge(ctx, at.Add(4*time.Hour), at); err != nil {
			return err
		}
		_, err = tx.Answer(ctx, a.ID, at)
		is(t, "purged", err, ErrNotFound)
		return nil
	})
	// A view inside of a transaction sees what it did; a transaction inside of one is refused, where it would wait for itself.
	update(t, s, func(ctx context.Context, tx Tx) error {
		joined := Join(ctx, tx)
		if err := tx.InsertAnswer(ctx, a); err != nil {
			return err
		}
		if err := s.Update(joined, func(Tx) error { return nil }); err == nil {
			t.Error("a transaction inside of a transaction")
		}
		return s.View(joined, func(tx Tx) error {
			_, err := tx.Answer(ctx, a.ID, at)
			return err
		})
	})
}
