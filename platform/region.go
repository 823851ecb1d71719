package platform

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"sallyway/internal/identity"
	"sallyway/platform/registry"
	"sallyway/platform/store"
	"sallyway/platform/view"
)

// RestoreRegion says in which region a backup is put in place.
type RestoreRegion struct {
	// Region is that of this deployment; "" is that of the database that is there, or else the backup's.
	Region string
	// Other takes a backup of another region, too: its organizations belong to Region from then on.
	Other bool
}

// checkRegion refuses a backup of another region, and returns the region that the database is to have after it: "" is the backup's.
func (h Home) checkRegion(ctx context.Context, file string, want RestoreRegion) (string, error) {
	if want.Region != "" && !identity.ValidLabel(want.Region) {
		return "", fmt.Errorf("region %.80q is not a label of lower-case letters, digits and hyphens, such as eu-central", want.Region)
	}
	region := want.Region
	if region == "" {
		region = h.presentRegion(ctx)
	}
	if region == "" {
		return "", nil
	}
	theirs, err := backupRegion(ctx, file)
	if err != nil {
		return "", err
	}
	if theirs != "" && theirs != region && !want.Other {
		return "", fmt.Errorf("%w: the backup is of %s, and this deployment is %s: restore it there, or take its organizations over into %s with --other-region", registry.ErrOtherRegion, theirs, region, region)
	}
	return region, nil
}

// presentRegion is the region of the database that is there, "" when there is none, or none that can be read: it is what a backup replaces.
func (h Home) presentRegion(ctx context.Context) (region string) {
	c := h.store()
	if c.Replicated() {
		return "" // a backup goes into an empty one, and opening it would make tables
	}
	if _, err := os.Stat(c.Path); err != nil {
		return ""
	}
	st, err := store.Open(ctx, c)
	if err != nil {
		return ""
	}
	defer st.Close()
	_ = st.View(ctx, func(tx store.Tx) (err error) { // as above
		region, err = view.Region(ctx, tx)
		return err
	})
	return region
}

// backupRegion reads the region of a backup. The backup itself is not opened, since that would bring it up to date.
func backupRegion(ctx context.Context, file string) (region string, err error) {
	dir, err := os.MkdirTemp("", "sallyway-backup-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	from, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer from.Close()
	path := filepath.Join(dir, "backup.db")
	to, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	_, err = io.Copy(to, from)
	if err := errors.Join(err, to.Close()); err != nil {
		return "", fmt.Errorf("read the backup: %w", err)
	}
	st, err := store.Open(ctx, store.Config{Path: path})
	if err != nil {
		return "", fmt.Errorf("read the backup: %w", err)
	}
	defer func() { err = errors.Join(err, st.Close()) }()
	err = st.View(ctx, func(tx store.Tx) (err error) {
		region, err = view.Region(ctx, tx)
		return err
	})
	return region, err
}
