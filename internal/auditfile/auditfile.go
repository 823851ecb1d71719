// Package auditfile is the file that an audit chain is exported to, and the check of it, which needs nothing but the file: no platform, no
// database, no network. Every line is a JSON document:
//
//	{"type":"chain","format":1,"org":"acme","exported":"…","roots":"PEM"}                       the first
//	{"type":"key","id":"…","certificates":"PEM, the key's own first"}                            before what it signed
//	{"type":"entry","seq":1,"at":"…","actor":"…","action":"…","object":"…","result":"…","detail":{…},"hash":"…"}
//	{"type":"checkpoint","seq":1,"hash":"…","at":"…","key":"…","signature":"base64"}             after the entry that it signs
//
// An entry's hash is SHA-256 over the hash before it (hexadecimal, nothing for the first) and the JSON of the entry without its hash, as Hash
// does it. A checkpoint is an Ed25519 signature (RFC 8032) over Message. Its key has a certificate under the organization's root, so whoever
// knows the root's pin can tell the file from one that somebody made up.
package auditfile

import (
	"crypto/ed25519"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"
)

// Format is the number of this format.
const Format = 1

// The types of lines.
const (
	TypeChain      = "chain"
	TypeKey        = "key"
	TypeEntry      = "entry"
	TypeCheckpoint = "checkpoint"
)

// Chain is the first line.
type Chain struct {
	Type     string    `json:"type"`
	Format   int       `json:"format"`
	Org      string    `json:"org"`
	Exported time.Time `json:"exported"`
	Roots    string    `json:"roots"` // PEM
}

// Key is a key that checkpoints are signed by.
type Key struct {
	Type         string `json:"type"`
	ID           string `json:"id"`
	Certificates string `json:"certificates"` // PEM, the key's own first
}

// Entry is an entry of the chain. Detail is the JSON that was hashed, byte for byte.
type Entry struct {
	Type   string          `json:"type"`
	Seq    int64           `json:"seq"`
	At     time.Time       `json:"at"` // microseconds
	Actor  string          `json:"actor"`
	Action string          `json:"action"`
	Object string          `json:"object"`
	Result string          `json:"result"`
	Detail json.RawMessage `json:"detail"`
	Hash   string          `json:"hash"`
}

// Checkpoint says that the chain had this head at a time.
type Checkpoint struct {
	Type      string    `json:"type"`
	Seq       int64     `json:"seq"`
	Hash      string    `json:"hash"`
	At        time.Time `json:"at"`
	Key       string    `json:"key"`
	Signature []byte    `json:"signature"`
}

// hashed is what a hash covers besides the hash before it.
type hashed struct {
	Org    string          `json:"org"`
	Seq    int64           `json:"seq"`
	At     string          `json:"at"`
	Actor  string          `json:"actor"`
	Action string          `json:"action"`
	Object string          `json:"object"`
	Result string          `json:"result"`
	Detail json.RawMessage `json:"detail"`
}

// Hash computes the hash of an entry of org that follows one with the hash prev ("" for the first). It does not look at e.Hash.
func Hash(prev, org string, e *Entry) (string, error) {
	b, err := json.Marshal(hashed{
		Org: org, Seq: e.Seq, At: e.At.UTC().Format(time.RFC3339Nano), Actor: e.Actor, Action: e.Action, Object: e.Object, Result: e.Result, Detail: e.Detail,
	})
	if err != nil {
		return "", fmt.Errorf("audit entry %d: %w", e.Seq, err)
	}
	h := sha256.New()
	h.Write([]byte(prev))
	h.Write(b)
	return hex.EncodeToString(h.Sum(nil)), nil
}

// Message is what a checkpoint's signature covers: fields in lines, none of which can hold a line's end.
func Message(org string, c *Checkpoint) []byte {
	return fmt.Appendf(nil, "sallyway audit checkpoint 1\n%s\n%d\n%s\n%s\n", org, c.Seq, c.Hash, c.At.UTC().Format(time.RFC3339Nano))
}

// Sign signs a checkpoint.
func Sign(key ed25519.PrivateKey, org string, c *Checkpoint) {
	c.Signature = ed25519.Sign(key, Message(org, c))
}
