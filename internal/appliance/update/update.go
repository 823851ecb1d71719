// Package update gives the appliance new versions of itself, and takes them back.
//
// An image is one file, a unified kernel image. Beside it lies its manifest with Ed25519 signatures. An appliance fetches the manifest, checks
// it against keys that it was built or configured with, refuses what is older or for another machine, fetches the image, and writes it to the
// boot partition beside the one that runs. By UEFI, systemd-boot starts it with three tries (its Automatic Boot Assessment). A start that has been
// healthy for 60 s is blessed: the counter is dropped. Otherwise the machine restarts, and after the last try systemd-boot goes back to the former
// image by itself.
//
// A BIOS knows no tries. There syslinux's menu has two entries, the new one and the one before; who wants the former back chooses it on the console.
// The kernel and initramfs for it are taken out of the same image.
//
//	u, err := update.New(update.Config{ESP: "/boot", Boot: update.FindBoot(update.EFIVars, update.CmdLine), Keys: keys, URL: url})
//	err = u.Run(ctx, healthy)     // blesses, looks for updates
//	switch {
//	case errors.Is(err, update.ErrInstalled), errors.Is(err, update.ErrUnhealthy):
//		restart()
//	}
//
// # Files on the boot partition
//
//	EFI/Linux/sallyway_VERSION[+LEFT[-DONE]].efi    UEFI, see Entry
//	loader/entries/sallyway_VERSION.conf            UEFI, the image that a disk for both comes with
//	bios/VERSION/vmlinuz, bios/VERSION/initrd       BIOS
//	bios/VERSION/tried, bios/VERSION/good           empty; this one was started, this one was blessed
//	bios/syslinux.cfg                               the menu
//
// What ends in .part is unfinished, and is removed by the next update.
package update

import (
	"cmp"
	"context"
	"crypto/ed25519"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"runtime"
	"sync"
	"time"
)

// Config of an Updater.
type Config struct {
	// ESP is the folder that the boot partition is mounted at.
	ESP string
	// Writable runs f while the boot partition is mounted for writing. Nil: it is all the time.
	Writable func(f func() error) error
	// Boot is how the machine was started. Where it names no version, Running is the one.
	Boot    Boot
	Running Version
	// Keys are public keys beside those that are compiled in (Pinned). Without any, nothing is installed.
	Keys []ed25519.PublicKey
	// URL is that of a signed manifest, which Run looks at every so often; "" is nowhere. It is https, or http to a literal private address.
	URL   string
	Every time.Duration // 0: once a day
	Roots *x509.CertPool
	Arch  string // "" is this program's
	// Tries is how often a new image is started without being blessed before the former one is; 0 is 3.
	Tries int
	// Healthy is how long the machine has to be healthy without a break before its image is blessed; 0 is 60 s. Trial is how long an image
	// that is on trial has for that; 0 is 10 minutes.
	Healthy, Trial time.Duration
	Log            *slog.Logger // nil: silent

	// For tests: free space in bytes, and what is called before each change of a file, which ends the update by an error as a power cut would.
	free func(folder string) (int64, error)
	step func(string) error
}

// Defaults.
const (
	defaultTries   = 3
	defaultHealthy = 60 * time.Second
	defaultTrial   = 10 * time.Minute
	defaultEvery   = 24 * time.Hour
	healthInterval = time.Second
)

var (
	// ErrInstalled is what Run returns when it has installed a version that a restart starts.
	ErrInstalled = errors.New("a new version is installed and waits for a restart")
	// ErrUnhealthy is what Run returns when a version on trial was not healthy in time: a restart tries again, or goes back.
	ErrUnhealthy = errors.New("the new version was not healthy in time")
	// ErrOlder means that a version is not newer than what there is.
	ErrOlder = errors.New("not newer than what is installed")
	// ErrFailed means that a version has been tried and was not healthy.
	ErrFailed = errors.New("this version was tried before and was not healthy")
)

// Updater owns the images on the boot partition. Its methods may be called concurrently; there has to be one only.
type Updater struct {
	cfg    Config
	log    *slog.Logger
	client *http.Client
	keys   []ed25519.PublicKey
	slots  slots

	mu     sync.Mutex // one change at a time; guards what follows
	latest string     // what the latest look for an update came to
}

// New makes an Updater, or says what is wrong in cfg. It changes nothing yet.
func New(cfg Config) (*Updater, error) {
	if cfg.ESP == "" {
		return nil, errors.New("update: there is no boot partition")
	}
	pinned, err := PinnedKeys()
	if err != nil {
		return nil, fmt.Errorf("update: keys of this build: %w", err)
	}
	if cfg.URL != "" {
		if _, err := checkURL(cfg.URL); err != nil {
			return nil, err
		}
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Writable == nil {
		cfg.Writable = func(f func() error) error { return f() }
	}
	if cfg.step == nil {
		cfg.step = func(string) error { return nil }
	}
	if cfg.free == nil {
		cfg.free = freeSpace
	}
	cfg.Running = cmp.Or(cfg.Boot.Version, cfg.Running)
	if _, err := ParseVersion(string(cfg.Running)); err != nil {
		return nil, fmt.Errorf("update: the image that runs has no version: %w", err)
	}
	cfg.Arch = cmp.Or(cfg.Arch, runtime.GOARCH)
	cfg.Tries = min(cmp.Or(cfg.Tries, defaultTries), maxTries)
	cfg.Healthy, cfg.Trial, cfg.Every = cmp.Or(cfg.Healthy, defaultHealthy), cmp.Or(cfg.Trial, defaultTrial), cmp.Or(cfg.Every, defaultEvery)
	u := &Updater{cfg: cfg, log: cfg.Log, keys: append(pinned, cfg.Keys...), client: newClient(cfg.Roots)}
	u.slots = &biosSlots{disk: disk{root: cfg.ESP, step: cfg.step}, running: cfg.Running}
	if cfg.Boot.UEFI {
		u.slots = &uefiSlots{disk: disk{root: cfg.ESP, step: cfg.step}, running: cfg.Running, tries: cfg.Tries}
	}
	return u, nil
}

// Slot is an image on the boot partition.
type Slot struct {
	Version Version `json:"version"`
	File    string  `json:"file"` // or folder, below the boot partition
	Running bool    `json:"running"`
	Good    bool    `json:"good"`   // it was blessed
	Failed  bool    `json:"failed"` // it used up its tries
	// TriesLeft and TriesDone are those of an image on trial.
	TriesLeft int `json:"tries_left,omitempty"`
	TriesDone int `json:"tries_done,omitempty"`
	// Next says that a restart starts it.
	Next bool `json:"next"`
}

// Status is what is known about the images.
type Status struct {
	Running Version `json:"running"`
	UEFI    bool    `json:"uefi"`  // false: no going back by itself
	Trial   bool    `json:"trial"` // the running one is not blessed yet
	Slots   []Slot  `json:"slots"` // newest first
	// Failed is the newest version that was tried and not healthy: the machine has gone back from it. "" is none.
	Failed Version `json:"failed,omitempty"`
	// Latest is what the latest look for an update came to, in words.
	Latest string `json:"latest,omitempty"`
}

// slots are the images as one kind of boot keeps them.
type slots interface {
	// list returns them, newest first.
	list() ([]Slot, error)
	// install writes a checked image, which then is the next to be started. It has room for it.
	install(m Manifest, image string) error
	// remove removes one that does not run.
	remove(s Slot) error
	// begin notes that the running one, which is on trial, was started.
	begin() error
	// bless marks the running one as good.
	bless() error
	// clean removes what is unfinished.
	clean() error
	// folder is where images are downloaded to.
	folder() string
}

// Status returns what is so now.
func (u *Updater) Status() (Status, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.statusLocked()
}

func (u *Updater) statusLocked() (Status, error) {
	all, err := u.slots.list()
	if err != nil {
		return Status{}, fmt.Errorf("look at the images: %w", err)
	}
	s := Status{Running: u.cfg.Running, UEFI: u.cfg.Boot.UEFI, Slots: all, Latest: u.latest}
	for _, slot := range all {
		if slot.Running && !slot.Good {
			s.Trial = true
		}
		if slot.Failed && !slot.Running && s.Failed == "" {
			s.Failed = slot.Version
		}
	}
	return s, nil
}

// Bless marks the image that runs as good: from now on it is started without being counted. It does nothing where that is so already.
func (u *Updater) Bless() error {
	u.mu.Lock()
	defer u.mu.Unlock()
	s, err := u.statusLocked()
	if err != nil || !s.Trial {
		return err
	}
	if err := u.cfg.Writable(u.slots.bless); err != nil {
		return fmt.Errorf("mark version %s as good: %w", u.cfg.Running, err)
	}
	u.log.Info("version is good", "version", u.cfg.Running)
	return nil
}

// Run blesses the running image when healthy has said true for Config.Healthy without a break, and looks for updates at Config.URL. It returns nil at the
// end of ctx, and otherwise an error that says why the machine should be restarted: ErrInstalled or ErrUnhealthy.
func (u *Updater) Run(ctx context.Context, healthy func() bool) error {
	s, err := u.Status()
	if err != nil {
		return err
	}
	if s.Failed != "" {
		u.log.Warn("a version was tried and not healthy, the one before runs", "failed", s.Failed, "running", s.Running)
	}
	if s.Trial {
		if err := u.cfg.Writable(u.slots.begin); err != nil {
			u.log.Warn("the boot partition cannot be written", "error", err)
		}
		if err := u.trial(ctx, healthy); err != nil || ctx.Err() != nil {
			return err
		}
	}
	if u.cfg.URL == "" {
		<-ctx.Done()
		return nil
	}
	// The first look is soon, and not everybody's at once after a power cut. What went wrong is tried again before the next look is due: the
	// network may not be there yet, or a server was away.
	retry := u.cfg.Every / 1440
	for wait := retry; ; {
		t := time.NewTimer(wait + rand.N(wait/4+1))
		select {
		case <-ctx.Done():
			t.Stop()
			return nil
		case <-t.C:
		}
		v, err := u.Install(ctx, u.cfg.URL, false)
		switch {
		case ctx.Err() != nil:
			return nil
		case err == nil:
			return fmt.Errorf("version %s: %w", v, ErrInstalled)
		case errors.Is(err, ErrOlder):
			u.note(fmt.Sprintf("%s is the newest version", u.cfg.Running))
			wait, retry = u.cfg.Every, u.cfg.Every/1440
		default:
			wait, retry = retry, min(2*retry, u.cfg.Every)
			u.note(err.Error())
			u.log.Warn("no update", "url", u.cfg.URL, "error", err)
		}
	}
}

func (u *Updater) note(s string) {
	u.mu.Lock()
	u.latest = s
	u.mu.Unlock()
}

// trial waits until the machine has been healthy for long enough, and blesses.
func (u *Updater) trial(ctx context.Context, healthy func() bool) error {
	end := time.NewTimer(u.cfg.Trial)
	defer end.Stop()
	tick := time.NewTicker(min(healthInterval, u.cfg.Healthy/4+1))
	defer tick.Stop()
	var since time.Time
	for {
		if !healthy() {
			since = time.Time{}
		} else if since.IsZero() {
			since = time.Now()
		} else if time.Since(since) >= u.cfg.Healthy {
			err := u.Bless()
			if err == nil {
				return nil
			}
			// Trying again is all there is: a restart would count against an image that is fine.
			u.log.Error("the version that runs is healthy and cannot be marked as good", "error", err)
			since = time.Time{}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-end.C:
			if u.cfg.Boot.UEFI {
				return fmt.Errorf("version %s: %w", u.cfg.Running, ErrUnhealthy)
			}
			// Nobody goes back by himself here: restarting would only interrupt.
			u.log.Error("the new version is not healthy; choose the one before in the boot menu to go back", "version", u.cfg.Running)
		case <-tick.C:
		}
	}
}

// Install fetches the signed manifest from a URL or a file, and the image that it names beside it, and makes that the next to be started.
// Force, which only somebody at this machine can say, takes older versions and such that have failed, too. The signature is always checked. It returns the
// version; that there is nothing newer is ErrOlder.
func (u *Updater) Install(ctx context.Context, from string, force bool) (Version, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if len(u.keys) == 0 {
		return "", errors.New("this appliance has no key to check updates by: set update.keys in its configuration")
	}
	src, err := open(u.client, from)
	if err != nil {
		return "", err
	}
	b, err := src.manifest(ctx)
	if err != nil {
		return "", fmt.Errorf("fetch %s: %w", from, err)
	}
	m, err := Open(b, u.keys)
	if err != nil {
		return "", fmt.Errorf("%s: %w", from, err)
	}
	if m.Arch != u.cfg.Arch {
		return "", fmt.Errorf("%s: version %s is for %s, and this machine is %s", from, m.Version, m.Arch, u.cfg.Arch)
	}
	s, err := u.statusLocked()
	if err != nil {
		return "", err
	}
	if err := admit(m, s, force); err != nil {
		return "", err
	}
	return m.Version, u.cfg.Writable(func() error { return u.write(ctx, src, m, s) })
}

// admit says whether a version may be installed where s is so.
func admit(m Manifest, s Status, force bool) error {
	for _, slot := range s.Slots {
		switch c := m.Version.Compare(slot.Version); {
		case c == 0 && slot.Running:
			return fmt.Errorf("version %s runs already: %w", m.Version, ErrOlder)
		case force:
		case c == 0 && slot.Failed:
			return fmt.Errorf("version %s: %w", m.Version, ErrFailed)
		case c == 0 && slot.Next:
			return fmt.Errorf("version %s waits for a restart already: %w", m.Version, ErrInstalled)
		case c < 0 && !slot.Failed:
			return fmt.Errorf("version %s, there is %s: %w", m.Version, slot.Version, ErrOlder)
		}
	}
	switch {
	case m.Version.Compare(s.Running) == 0:
		return fmt.Errorf("version %s runs already: %w", m.Version, ErrOlder)
	case force:
	case m.Version.Compare(s.Running) < 0:
		return fmt.Errorf("version %s, and %s runs: %w", m.Version, s.Running, ErrOlder)
	case s.Trial:
		return fmt.Errorf("version %s is on trial itself: try again when it has been healthy for a while", s.Running)
	}
	return nil
}
