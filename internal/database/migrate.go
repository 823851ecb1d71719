package database

import (
	"context"
	"database/sql"
	"fmt"
	"io"
	"io/fs"
	"regexp"
	"strings"

	"github.com/pressly/goose/v3"
)

// migrate brings the schema up to date. Migrations are written once, in SQLite's words; words translates them, nil leaves them.
func migrate(ctx context.Context, db *sql.DB, schema Schema, kind goose.Dialect, words func(string) string, options ...goose.ProviderOption) error {
	files := schema.Migrations
	if words != nil {
		files = translated{files, words}
	}
	p, err := goose.NewProvider(kind, db, files, options...)
	if err != nil {
		return err
	}
	have, want, err := p.GetVersions(ctx)
	if err != nil {
		return err
	}
	if have > want {
		return fmt.Errorf("schema %d is newer than this program knows (%d): run the newer %s, or restore a backup", have, want, schema.Program)
	}
	if have == want {
		return nil
	}
	_, err = p.Up(ctx)
	return err
}

var postgresWords = regexp.MustCompile(`\b(BLOB|TEXT)\b`)

// toPostgres translates the words of a migration that PostgreSQL has others for. Texts are compared byte by byte, as in SQLite: the order of
// names in pages must not depend on the locale that a database was made with.
func toPostgres(sql string) string {
	return postgresWords.ReplaceAllStringFunc(sql, func(w string) string {
		if w == "BLOB" {
			return "BYTEA"
		}
		return `TEXT COLLATE "C"`
	})
}

// translated is a file system whose files are translated when they are opened.
type translated struct {
	fs.FS
	words func(string) string
}

// Open implements fs.FS.
func (t translated) Open(name string) (fs.File, error) {
	f, err := t.FS.Open(name)
	if err != nil {
		return nil, err
	}
	if st, err := f.Stat(); err != nil || st.IsDir() {
		return f, err
	}
	b, err := io.ReadAll(f)
	return &translatedFile{File: f, r: strings.NewReader(t.words(string(b)))}, err
}

// ReadDir implements fs.ReadDirFS.
func (t translated) ReadDir(name string) ([]fs.DirEntry, error) { return fs.ReadDir(t.FS, name) }

type translatedFile struct {
	fs.File
	r io.Reader
}

// Read implements fs.File.
func (f *translatedFile) Read(b []byte) (int, error) { return f.r.Read(b) }
