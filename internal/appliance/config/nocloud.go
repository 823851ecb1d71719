package config

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"go.yaml.in/yaml/v3"
)

// A seed disk is a file system with the label CIDATA (cloud-init's NoCloud) or config-2 (OpenStack's config drive). We obey a small part
// of what can stand on one: the key sallyway: of a #cloud-config document, and the host name.

// Kind is the sort of a seed disk.
type Kind string

// The kinds of seed disks.
const (
	NoSeed      Kind = ""
	NoCloud     Kind = "nocloud"
	ConfigDrive Kind = "config-drive"
)

// Seed says which seed a file system is, by its label, and as which type it is mounted. r is the block device; a device that is neither
// iso9660 nor vfat is NoSeed.
func Seed(r io.ReaderAt) (kind Kind, fstype string) {
	label, fstype := volume(r)
	switch strings.ToLower(label) {
	case "cidata":
		return NoCloud, fstype
	case "config-2":
		return ConfigDrive, fstype
	}
	return NoSeed, ""
}

// volume reads the label of an iso9660 (ECMA-119 section 8.4: the primary volume descriptor is in sector 16) or a FAT file system (its
// boot sector).
func volume(r io.ReaderAt) (label, fstype string) {
	var iso [72]byte
	if _, err := r.ReadAt(iso[:], 16*2048); err == nil && string(iso[1:6]) == "CD001" && iso[0] == 1 {
		return strings.TrimRight(string(iso[40:72]), " \x00"), "iso9660"
	}
	var boot [512]byte
	if _, err := r.ReadAt(boot[:], 0); err != nil || boot[510] != 0x55 || boot[511] != 0xaa {
		return "", ""
	}
	for _, at := range []struct{ signature, label, name int }{{66, 71, 82}, {38, 43, 54}} { // FAT32, then FAT12 and FAT16
		if boot[at.signature] == 0x29 && string(boot[at.name:at.name+3]) == "FAT" {
			return strings.TrimRight(string(boot[at.label:at.label+11]), " \x00"), "vfat"
		}
	}
	return "", ""
}

// ReadSeed reads the configuration from a mounted seed disk. where is its device, for people.
func ReadSeed(disk fs.FS, kind Kind, where string) Found {
	f := Found{Source: string(NoCloud), Where: where}
	userData, metaData := "user-data", "meta-data"
	if kind == ConfigDrive {
		f.Source = string(ConfigDrive)
		userData, metaData = "openstack/latest/user_data", "openstack/latest/meta_data.json"
	}
	data, err := readLimited(disk, userData)
	if errors.Is(err, fs.ErrNotExist) {
		return f
	} else if err != nil {
		f.Err = err
		return f
	}
	f.Config, f.Notes, f.Err = cloudConfig(data)
	if f.Config != nil && f.Config.Hostname == "" {
		if meta, err := readLimited(disk, metaData); err == nil {
			f.Config.Hostname = metaHostname(meta)
		}
	}
	if _, err := fs.Stat(disk, "network-config"); err == nil && f.Config != nil {
		f.Notes = append(f.Notes, "network-config on the seed disk is not read: put the network below sallyway: in user-data, as network:")
	}
	return f
}

func readLimited(disk fs.FS, name string) ([]byte, error) {
	f, err := disk.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxDocument+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(b) > maxDocument {
		return nil, fmt.Errorf("%s is larger than %d bytes", name, maxDocument)
	}
	return b, nil
}

// cloudConfig reads a #cloud-config document: our key and the host name. Everything else gets a note.
func cloudConfig(data []byte) (*Config, []string, error) {
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	first, _, _ := bytes.Cut(data, []byte("\n"))
	if len(bytes.TrimSpace(data)) == 0 {
		return nil, nil, nil
	}
	if strings.TrimSpace(string(first)) != "#cloud-config" {
		return nil, []string{fmt.Sprintf("user-data begins with %.20q and not with #cloud-config: it is not read", first)}, nil
	}
	n, err := mapping(data)
	if errors.Is(err, ErrEmpty) {
		return nil, nil, nil
	} else if err != nil {
		return nil, nil, fmt.Errorf("user-data: %w", err)
	}
	var c *Config
	var notes []string
	var host string
	for i := 0; i+1 < len(n.Content); i += 2 {
		key, value := n.Content[i].Value, n.Content[i+1]
		switch key {
		case "sallyway":
			if c, err = parseNode(value); err != nil && !errors.Is(err, ErrEmpty) {
				return nil, notes, fmt.Errorf("user-data: sallyway: %w", err)
			}
		case "hostname":
			host = value.Value
		case "fqdn":
			if host == "" {
				host = value.Value
			}
		case "write_files":
			notes = append(notes, "user-data: write_files is refused: an appliance has no files to write; its settings are below sallyway:")
		default:
			notes = append(notes, fmt.Sprintf("user-data: %.40s is not obeyed: an appliance runs Sallyway and nothing else", key))
		}
	}
	if c != nil && host != "" {
		if len(host) <= maxHostname && hostnames.MatchString(host) {
			c.Hostname = host
		} else {
			notes = append(notes, fmt.Sprintf("user-data: hostname %.70q is no host name", host))
		}
	}
	return c, notes, nil
}

// metaHostname reads the host name from meta-data (YAML, or JSON on a config drive); "" where there is no good one.
func metaHostname(b []byte) string {
	var m struct {
		Local string `yaml:"local-hostname" json:"-"`
		Name  string `yaml:"hostname" json:"hostname"`
	}
	if json.Unmarshal(b, &m) != nil {
		_ = yaml.Unmarshal(b, &m) // what is no document has no name
	}
	if m.Local == "" {
		m.Local = m.Name
	}
	if len(m.Local) > maxHostname || !hostnames.MatchString(m.Local) {
		return ""
	}
	return m.Local
}

// mapping reads a document of keys and values; an empty one is ErrEmpty.
func mapping(b []byte) (*yaml.Node, error) {
	var doc yaml.Node
	if err := yaml.Unmarshal(b, &doc); err != nil {
		return nil, quiet(err)
	}
	if len(doc.Content) == 0 || doc.Content[0].Tag == "!!null" {
		return nil, ErrEmpty
	}
	if doc.Content[0].Kind != yaml.MappingNode {
		return nil, errors.New("want keys and values (key: value)")
	}
	return doc.Content[0], nil
}

// unwrapped returns what stands below the key sallyway of a document that is a whole #cloud-config, such as the user-data of a seed that
// somebody hands over by SMBIOS; any other document as it is.
func unwrapped(doc []byte) []byte {
	n, err := mapping(doc)
	if err != nil {
		return doc
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == "sallyway" {
			if b, err := yaml.Marshal(n.Content[i+1]); err == nil {
				return b
			}
		}
	}
	return doc
}

// hasKey says whether a document of keys and values has one at its top.
func hasKey(doc []byte, key string) bool {
	n, err := mapping(doc)
	if err != nil {
		return false
	}
	for i := 0; i+1 < len(n.Content); i += 2 {
		if n.Content[i].Value == key {
			return true
		}
	}
	return false
}
