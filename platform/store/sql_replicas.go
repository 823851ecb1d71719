package store

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"
)

func (t *sqlTx) PutReplica(ctx context.Context, r *Replica) error {
	return t.exec(ctx, true, `INSERT INTO replicas (id, address, started, seen, streams) VALUES (?, ?, ?, ?, ?)
		ON CONFLICT (id) DO UPDATE SET address = excluded.address, seen = excluded.seen, streams = excluded.streams`,
		r.ID, r.Address, micros(r.Started), micros(r.Seen), r.Streams)
}

func (t *sqlTx) Replicas(ctx context.Context) ([]*Replica, error) {
	return many(ctx, t, func(r row) (*Replica, error) {
		var v Replica
		return &v, r.Scan(&v.ID, &v.Address, stamp{&v.Started}, stamp{&v.Seen}, &v.Streams)
	}, `SELECT id, address, started, seen, streams FROM replicas ORDER BY started, id`)
}

func (t *sqlTx) DropReplica(ctx context.Context, id string) error {
	return t.exec(ctx, false, `DELETE FROM replicas WHERE id = ?`, id)
}

// beatsAtOnce is how many beats one statement writes: a round trip to the database costs more than a row.
const beatsAtOnce = 100

func (t *sqlTx) PutBeats(ctx context.Context, bs []*Beat) error {
	for part := range slices.Chunk(bs, beatsAtOnce) {
		args := make([]any, 0, 4*len(part))
		for _, b := range part {
			args = append(args, b.Node, b.Replica, micros(b.At), string(b.Beat))
		}
		if err := t.exec(ctx, true, `INSERT INTO replica_beats (node, replica, at, beat) VALUES (?, ?, ?, ?)`+strings.Repeat(`, (?, ?, ?, ?)`, len(part)-1)+
			` ON CONFLICT (node) DO UPDATE SET replica = excluded.replica, at = excluded.at, beat = excluded.beat`, args...); err != nil {
			return err
		}
	}
	return nil
}

func (t *sqlTx) Beats(ctx context.Context, since time.Time, except string) ([]*Beat, error) {
	return many(ctx, t, func(r row) (*Beat, error) {
		var v Beat
		var beat string
		err := r.Scan(&v.Node, &v.Replica, stamp{&v.At}, &beat)
		v.Beat = []byte(beat)
		return &v, err
	}, `SELECT node, replica, at, beat FROM replica_beats WHERE at >= ? AND replica <> ?`, micros(since), except)
}

func (t *sqlTx) TakeLease(ctx context.Context, name, holder string, now, until time.Time) (bool, error) {
	var got string
	err := t.row(ctx, `INSERT INTO leases (name, holder, expires) VALUES (?, ?, ?)
		ON CONFLICT (name) DO UPDATE SET holder = excluded.holder, expires = excluded.expires
		WHERE leases.expires <= ? OR leases.holder = excluded.holder RETURNING holder`, name, holder, micros(until), micros(now)).Scan(&got)
	if errors.Is(err, ErrNotFound) {
		return false, nil
	}
	return err == nil, err
}

func (t *sqlTx) DropLease(ctx context.Context, name, holder string) error {
	return t.exec(ctx, false, `DELETE FROM leases WHERE name = ? AND holder = ?`, name, holder)
}

func (t *sqlTx) PurgeReplicas(ctx context.Context, since time.Time) error {
	if err := t.exec(ctx, false, `DELETE FROM replicas WHERE seen < ?`, micros(since)); err != nil {
		return err
	}
	return t.exec(ctx, false, `DELETE FROM replica_beats WHERE at < ?`, micros(since))
}
