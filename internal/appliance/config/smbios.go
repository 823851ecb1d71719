package config

import (
	"bytes"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// A hypervisor's SMBIOS strings (DSP0134 section 7.12, type 11 "OEM Strings") and fw_cfg files carry credentials as systemd has them
// (systemd.system-credentials(7)): io.systemd.credential:NAME=TEXT and io.systemd.credential.binary:NAME=BASE64.

const (
	configCredential = "sallyway.config"
	tokenCredential  = "sallyway.token"
)

// oemStrings returns the strings of one SMBIOS structure of type 11, as /sys/firmware/dmi/entries/11-*/raw has it: a header of type,
// length and handle, the count, then the strings, each ended by a zero, and another zero.
func oemStrings(raw []byte) ([]string, error) {
	const header = 5
	if len(raw) < header || raw[0] != 11 {
		return nil, errors.New("is no structure of OEM strings")
	}
	start := int(raw[1])
	if start < header || start > len(raw) {
		return nil, errors.New("is damaged: its length is wrong")
	}
	var out []string
	rest := raw[start:]
	for range raw[4] {
		s, after, found := bytes.Cut(rest, []byte{0})
		if !found {
			return nil, errors.New("is damaged: a string has no end")
		}
		out, rest = append(out, string(s)), after
	}
	return out, nil
}

// credentials finds credentials of ours among OEM strings. The first of a name wins.
func credentials(lines []string) (map[string][]byte, error) {
	found := make(map[string][]byte)
	var errs []error
	for _, l := range lines {
		key, value, _ := strings.Cut(l, "=")
		kind, name, ours := strings.Cut(key, ":")
		if !ours || name != configCredential && name != tokenCredential {
			continue
		}
		if found[name] != nil {
			continue
		}
		switch kind {
		case "io.systemd.credential":
			found[name] = []byte(value)
		case "io.systemd.credential.binary":
			b, err := base64.StdEncoding.DecodeString(strings.TrimSpace(value))
			if err != nil {
				errs = append(errs, fmt.Errorf("credential %s is not base64", name))
				continue
			}
			found[name] = b
		}
	}
	return found, errors.Join(errs...)
}

// fromCredentials makes a configuration of the two credentials; nil of none.
func fromCredentials(m map[string][]byte) (*Config, error) {
	doc, token := m[configCredential], strings.TrimSpace(string(m[tokenCredential]))
	return withToken(doc, token)
}

// SMBIOS looks into the firmware's strings. sys is /sys.
func SMBIOS(sys fs.FS) Found {
	f := Found{Source: "smbios"}
	entries, _ := fs.Glob(sys, "firmware/dmi/entries/11-*/raw") // the pattern is right
	slices.Sort(entries)
	var lines []string
	for _, e := range entries {
		raw, err := fs.ReadFile(sys, e)
		if err == nil {
			var more []string
			more, err = oemStrings(raw)
			lines = append(lines, more...)
		}
		if err != nil {
			f.Notes = append(f.Notes, fmt.Sprintf("SMBIOS entry %s: %v", path.Base(path.Dir(e)), err))
		}
	}
	m, err := credentials(lines)
	if err != nil {
		f.Err = err
		return f
	}
	f.Config, f.Err = fromCredentials(m)
	return f
}

// fwCfg are the folders of qemu's fw_cfg files, with the names of ours in them.
var fwCfg = []struct{ folder, config, token string }{
	{"firmware/qemu_fw_cfg/by_name/opt/sallyway", "config", "token"},
	{"firmware/qemu_fw_cfg/by_name/opt/io.systemd.credentials", configCredential, tokenCredential},
}

// FwCfg looks into qemu's fw_cfg. sys is /sys.
func FwCfg(sys fs.FS) Found {
	f := Found{Source: "fw_cfg"}
	m := make(map[string][]byte)
	for _, c := range fwCfg {
		for credential, name := range map[string]string{configCredential: c.config, tokenCredential: c.token} {
			b, err := fs.ReadFile(sys, path.Join(c.folder, name, "raw"))
			if err == nil && m[credential] == nil {
				m[credential] = b
			} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
				f.Notes = append(f.Notes, fmt.Sprintf("fw_cfg %s: %v", name, err))
			}
		}
	}
	f.Config, f.Err = fromCredentials(m)
	return f
}
