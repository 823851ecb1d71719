// Package seed writes the disk from which an appliance learns what it is: its role, its token, and where static addresses are used, its place in
// the network.
//
// The disk is what cloud-init calls NoCloud: ISO 9660 with Rock Ridge names, labelled CIDATA, with the files user-data and meta-data. In user-data
// stands, under one key, the configuration that internal/appliance/config reads from every source:
//
//	#cloud-config
//	sallyway:
//	  role: gateway
//	  token: swe1.…
//	  hostname: office
//
// A seed holds a token: whoever reads the disk can enrol in its place, once, within the hour that the token lives.
package seed

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"io"
	"net/netip"

	"go.yaml.in/yaml/v3"
)

// Label is the volume label of a seed's disk.
const Label = "CIDATA"

// Names of the files on the disk.
const (
	UserData = "user-data"
	MetaData = "meta-data"
)

// Seed is what an appliance is told. It holds a secret, the token.
type Seed struct {
	Role     string  `yaml:"role"`  // gateway or relay
	Token    string  `yaml:"token"` // carries the platform's URL and pin
	Hostname string  `yaml:"hostname,omitempty"`
	Network  Network `yaml:"network,omitempty"`
}

// Network is the machine's place in the network, in the form of internal/appliance/network. The zero value is DHCP and router advertisements.
type Network struct {
	Addresses []netip.Prefix `yaml:"addresses,omitempty"` // static; empty is DHCP
	Routers   []netip.Addr   `yaml:"routers,omitempty"`   // default routes
	DNS       []netip.Addr   `yaml:"dns,omitempty"`
	NTP       []string       `yaml:"ntp,omitempty"`   // names or addresses
	Proxy     string         `yaml:"proxy,omitempty"` // URL of the proxy that outgoing connections have to take
}

// IsZero says that nothing is set.
func (n Network) IsZero() bool {
	return n.Addresses == nil && n.Routers == nil && n.DNS == nil && n.NTP == nil && n.Proxy == ""
}

// Documents returns the two files of s: user-data, which is secret, and meta-data, whose instance-id changes with what the seed says.
func (s Seed) Documents() (userData, metaData []byte, err error) {
	var b bytes.Buffer
	b.WriteString("#cloud-config\n")
	e := yaml.NewEncoder(&b)
	e.SetIndent(2)
	if err := e.Encode(map[string]Seed{"sallyway": s}); err != nil {
		return nil, nil, err
	}
	if err := e.Close(); err != nil {
		return nil, nil, err
	}
	sum := sha256.Sum256(b.Bytes())
	meta := struct {
		Instance string `yaml:"instance-id"`
		Hostname string `yaml:"local-hostname,omitempty"`
	}{"sallyway-" + hex.EncodeToString(sum[:8]), s.Hostname}
	metaData, err = yaml.Marshal(meta)
	return b.Bytes(), metaData, err
}

// WriteISO writes the seed's disk. The same seed gives the same bytes. What is written is secret.
func (s Seed) WriteISO(w io.Writer) error {
	user, meta, err := s.Documents()
	if err != nil {
		return err
	}
	_, err = w.Write(iso([]isoFile{{MetaData, "METADATA.;1", meta}, {UserData, "USERDATA.;1", user}}))
	return err
}
