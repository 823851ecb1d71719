package platform

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"sallyway/platform/keyring"
	"sallyway/platform/pki"
	"sallyway/platform/presence"
	"sallyway/platform/registry"
	"sallyway/platform/replica"
	"sallyway/platform/store"
)

// Home is where a platform keeps what it knows. The fields are those of Config.
type Home struct {
	Data                        string
	Database                    string
	Connections                 int
	MasterKey, MasterKeyCommand string
}

// Home is where the platform of this configuration keeps what it knows.
func (c *Config) Home() Home {
	return Home{Data: c.Data, Database: c.Database, Connections: c.Connections, MasterKey: c.MasterKey, MasterKeyCommand: c.MasterKeyCommand}
}

// String names the home in errors; it shows no password.
func (h Home) String() string { return h.Data }

func (h Home) store() store.Config {
	return store.Config{URL: h.Database, Path: filepath.Join(h.Data, databaseFile), Connections: h.Connections}
}

// masterPath is the file of the master key.
func (h Home) masterPath() string {
	if h.MasterKey != "" {
		return h.MasterKey
	}
	return filepath.Join(h.Data, masterFile)
}

// MasterKeyName says where the master key is: its file, or what asks for it.
func (h Home) MasterKeyName() string {
	if h.MasterKeyCommand != "" {
		return "what --master-key-command asks"
	}
	return h.masterPath()
}

// Limits of the command that prints the master key.
const (
	commandTimeout = time.Minute
	commandOutput  = 4 << 10 // bytes
)

// master reads the master key; create makes the file when there is none.
func (h Home) master(ctx context.Context, create bool) (*pki.Master, error) {
	if h.MasterKeyCommand == "" {
		return pki.LoadMaster(h.masterPath(), create)
	}
	if h.MasterKey != "" {
		return nil, errors.New("a file and a command for the master key are given: use one of --master-key and --master-key-command")
	}
	ctx, cancel := context.WithTimeout(ctx, commandTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", h.MasterKeyCommand)
	cmd.Stderr = os.Stderr // it tells the operator what is wrong; the key goes to standard output
	cmd.WaitDelay = time.Second
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("command for the master key: %w", err)
	}
	b, readErr := io.ReadAll(io.LimitReader(out, commandOutput))
	if err := errors.Join(readErr, cmd.Wait()); err != nil {
		return nil, fmt.Errorf("command for the master key: %w: run it by hand as the platform's user", err)
	}
	return pki.ParseMaster(bytes.TrimSpace(b), "the command")
}

// open opens the database and the keys, and makes what is missing.
func (h Home) open(ctx context.Context, log *slog.Logger, now func() time.Time) (*store.DB, *registry.Registry, error) {
	if err := os.MkdirAll(h.Data, 0o700); err != nil {
		return nil, nil, fmt.Errorf("data folder: %w", err)
	}
	st, err := store.Open(ctx, h.store())
	if err != nil {
		return nil, nil, err
	}
	reg, err := h.registry(ctx, st, log, now)
	if err != nil {
		return nil, nil, errors.Join(err, st.Close())
	}
	return st, reg, nil
}

func (h Home) registry(ctx context.Context, st *store.DB, log *slog.Logger, now func() time.Time) (*registry.Registry, error) {
	fresh := false
	if err := st.View(ctx, func(tx store.Tx) error {
		orgs, err := tx.Orgs(ctx, store.Page{Limit: 1})
		fresh = len(orgs) == 0
		return err
	}); err != nil {
		return nil, err
	}
	master, err := h.master(ctx, fresh)
	if err != nil {
		if !fresh && h.store().Replicated() && errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w; on another replica it is in the data folder", err)
		}
		return nil, err
	}
	seal, err := keyring.Open(ctx, st, master, now(), registry.Reseal)
	if errors.Is(err, keyring.ErrOtherMaster) {
		return nil, fmt.Errorf("%w\ncopy the master key of the platform that made the database here (0600), from another replica or your backup of it", err)
	}
	if err != nil {
		return nil, err
	}
	reg := &registry.Registry{Store: st, Seal: seal, Board: new(presence.Board), Log: log, Now: now}
	if _, err := reg.Bootstrap(ctx); err != nil {
		return nil, err
	}
	return reg, nil
}

// existing opens what a platform has run on.
func (h Home) existing(ctx context.Context) (*store.DB, *registry.Registry, error) {
	if c := h.store(); !c.Replicated() {
		if _, err := os.Stat(c.Path); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return nil, nil, fmt.Errorf("there is no platform in %s: start one with `platformd serve`, or name its folder with --data", h.Data)
			}
			return nil, nil, err
		}
	}
	return h.open(ctx, slog.New(slog.DiscardHandler), time.Now)
}

// Rotated is what RotateMaster did.
type Rotated struct {
	File   string // of the new master key
	Old    string // where the one before is kept
	Finish bool   // the old one still opens the database, until FinishRotation
}

// RotateMaster makes a new master key and wraps the data keys by it, while platforms run. The old key file is kept beside the new one. Unless
// several platforms may share the database, the old key opens it no more. With a file that holds a key, that is the new one, and no file changes:
// the platform's configuration has to name it (or the command that prints it) next.
func (h Home) RotateMaster(ctx context.Context, file string) (r Rotated, err error) {
	if h.MasterKeyCommand != "" && file == "" {
		return r, errors.New("the master key comes by a command: have a new one made, and name a file with it by --new-master-key")
	}
	st, _, err := h.existing(ctx)
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	old, err := h.master(ctx, false)
	if err != nil {
		return r, err
	}
	if file != "" {
		next, err := pki.LoadMaster(file, false)
		if err != nil {
			return r, err
		}
		return Rotated{File: file, Finish: true}, keyring.Wrap(ctx, st, old, next)
	}
	r.File = h.masterPath()
	next := pki.NewMaster()
	// The order lets a crash at any point leave a file that opens the database.
	tmp := r.File + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return r, err
	}
	if err := next.WriteNew(tmp); err != nil {
		return r, err
	}
	if err := keyring.Wrap(ctx, st, old, next); err != nil {
		return r, errors.Join(err, os.Remove(tmp))
	}
	r.Old = fmt.Sprintf("%s.before-%s", r.File, time.Now().UTC().Format("20060102T150405"))
	if err := os.Link(r.File, r.Old); err != nil {
		return r, err
	}
	if err := os.Rename(tmp, r.File); err != nil {
		return r, err
	}
	if h.store().Replicated() {
		r.Finish = true
		return r, nil
	}
	_, err = keyring.Forget(ctx, st, next)
	return r, err
}

// FinishRotation leaves the master key of this home as the only one that opens the database. It returns how many others did.
func (h Home) FinishRotation(ctx context.Context) (others int, err error) {
	st, _, err := h.existing(ctx)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	master, err := h.master(ctx, false)
	if err != nil {
		return 0, err
	}
	return keyring.Forget(ctx, st, master)
}

// RenewDataKey makes a new data key and seals every secret anew. No platform may run on the database.
func (h Home) RenewDataKey(ctx context.Context) (err error) {
	st, _, err := h.existing(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	if err := st.View(ctx, func(tx store.Tx) error {
		rs, err := tx.Replicas(ctx)
		for _, r := range rs {
			if time.Since(r.Seen) < replica.DeadAfter {
				return fmt.Errorf("a platform at %s runs on this database, and would not know the new key: stop all platforms first", r.Address)
			}
		}
		return err
	}); err != nil {
		return err
	}
	master, err := h.master(ctx, false)
	if err != nil {
		return err
	}
	return keyring.Renew(ctx, st, master, time.Now(), registry.Reseal)
}
