package appliance

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"sallyway/internal/appliance/config"
	"sallyway/internal/appliance/state"
	"sallyway/internal/appliance/update"
	"sallyway/internal/version"
)

// bootFolder is where the boot partition is mounted, read-only but for an update's moments.
const bootFolder = "/boot"

// updates is the updater and its run. The zero value has none.
type updates struct {
	mu      sync.Mutex
	mounted bool               // guarded by mu
	updater *update.Updater    // nil: no updates; guarded by mu
	cancel  context.CancelFunc // guarded by mu
	done    chan struct{}      // guarded by mu
}

// startUpdater looks after the images on the boot partition as a configuration says, nil says nothing, in the place of the updater before. It
// goes on whatever becomes of the configuration: an image on trial that serves nothing has to be given up.
func (n *node) startUpdater(c *config.Config) {
	n.stopUpdater()
	u, err := n.newUpdater(c)
	if err != nil {
		n.note("no updates: " + err.Error())
		return
	}
	if u == nil {
		return
	}
	ctx, cancel := context.WithCancel(context.Background()) // ends by stopUpdater
	done := make(chan struct{})
	n.updates.mu.Lock()
	n.updates.updater, n.updates.cancel, n.updates.done = u, cancel, done
	n.updates.mu.Unlock()
	go func() {
		defer close(done)
		err := u.Run(ctx, n.healthy.Load)
		switch {
		case errors.Is(err, update.ErrInstalled), errors.Is(err, update.ErrUnhealthy):
			n.turnOff(true, err.Error())
		case err != nil && ctx.Err() == nil:
			n.note("updates: " + err.Error())
		}
	}()
}

// stopUpdater ends the updater and waits for it.
func (n *node) stopUpdater() {
	n.updates.mu.Lock()
	cancel, done := n.updates.cancel, n.updates.done
	n.updates.updater, n.updates.cancel, n.updates.done = nil, nil, nil
	n.updates.mu.Unlock()
	if cancel != nil {
		cancel()
		<-done
	}
}

// newUpdater makes an updater; nil where there is no boot partition, as under a kernel that was started directly.
func (n *node) newUpdater(c *config.Config) (*update.Updater, error) {
	boot := update.FindBoot(update.EFIVars, update.CmdLine)
	n.updates.mu.Lock()
	mounted := n.updates.mounted
	n.updates.mu.Unlock()
	if !mounted {
		device := state.Finder{Sys: "/sys", Dev: "/dev", Log: n.slog}.BootPartition(boot.Partition)
		if device == "" {
			return nil, nil
		}
		if err := unix.Mount(filepath.Join("/dev", device), bootFolder, "vfat", bootFlags|unix.MS_RDONLY, bootOptions); err != nil {
			return nil, fmt.Errorf("mount the boot partition %s: %w", device, err)
		}
		n.updates.mu.Lock()
		n.updates.mounted = true
		n.updates.mu.Unlock()
	}
	if _, err := os.Stat(filepath.Join(bootFolder, "bios/syslinux.cfg")); !boot.UEFI && err != nil {
		return nil, nil // no loader of the image's started this kernel
	}
	cfg := update.Config{ESP: bootFolder, Writable: writableBoot, Boot: boot, Log: n.slog}
	if boot.Version == "" {
		v, err := update.ParseVersion(version.Get().Version)
		if err != nil {
			return nil, errors.New("the image that runs says no version")
		}
		cfg.Running = v
	}
	if c != nil {
		// An image on trial is looked after whatever is wrong with these.
		keys, err := update.ParsePublicKeys(c.Update.Keys)
		if err == nil {
			with := cfg
			with.URL, with.Every, with.Keys = c.Update.URL, c.Update.Every, keys
			var u *update.Updater
			if u, err = update.New(with); err == nil {
				return u, nil
			}
		}
		n.note("update: " + err.Error() + "; no updates are looked for")
	}
	return update.New(cfg)
}

const (
	bootFlags   = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC | unix.MS_NOATIME
	bootOptions = "umask=0077,flush"
)

// writableBoot runs f while the boot partition can be written.
func writableBoot(f func() error) error {
	if err := unix.Mount("", bootFolder, "", bootFlags|unix.MS_REMOUNT, bootOptions); err != nil {
		return fmt.Errorf("make the boot partition writable: %w", err)
	}
	err := f()
	unix.Sync()
	if back := unix.Mount("", bootFolder, "", bootFlags|unix.MS_REMOUNT|unix.MS_RDONLY, bootOptions); back != nil {
		err = errors.Join(err, fmt.Errorf("make the boot partition read-only again: %w", back))
	}
	return err
}

// slotText is the running image for the console.
type slotText struct{ Version, Text string }

// slot says which image runs, and what else there is to say about images.
func (n *node) slot() slotText {
	n.updates.mu.Lock()
	u := n.updates.updater
	n.updates.mu.Unlock()
	if u == nil {
		return slotText{}
	}
	st, err := u.Status()
	if err != nil {
		return slotText{Text: err.Error()}
	}
	t := slotText{Version: string(st.Running)}
	by := "BIOS: no going back by itself"
	if st.UEFI {
		by = "UEFI"
	}
	t.Text = fmt.Sprintf("%s (%s)", st.Running, by)
	if st.Trial {
		t.Text += ", on trial"
	}
	for _, s := range st.Slots {
		switch {
		case s.Running:
		case s.Failed:
			t.Text += fmt.Sprintf("; %s was tried and failed", s.Version)
		case s.Next:
			t.Text += fmt.Sprintf("; %s starts next", s.Version)
		default:
			t.Text += fmt.Sprintf("; %s is there, too", s.Version)
		}
	}
	if st.Latest != "" {
		t.Text += "; " + st.Latest
	}
	t.Text = cmp.Or(t.Text, string(st.Running))
	return t
}
