package web

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"io/fs"
	"net/http"
	"path"
	"time"
)

// asset is a file that browsers keep for as long as they like: its URL changes with its content.
type asset struct {
	name, hash string
	body       []byte
}

// contentTypes are fixed here: what the host's MIME table says differs from host to host.
var contentTypes = map[string]string{
	".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8", ".svg": "image/svg+xml",
}

func loadAssets(dir fs.FS) (map[string]asset, error) {
	out := make(map[string]asset)
	names, err := fs.Glob(dir, "*")
	if err != nil {
		return nil, err
	}
	for _, name := range names {
		b, err := fs.ReadFile(dir, name)
		if err != nil {
			return nil, err
		}
		sum := sha256.Sum256(b)
		out[name] = asset{name: name, hash: hex.EncodeToString(sum[:6]), body: b}
	}
	return out, nil
}

// assetURL is the URL of a file in static.
func (s *Server) assetURL(name string) string { return "/static/" + name + "?v=" + s.assets[name].hash }

func (s *Server) static(w http.ResponseWriter, r *http.Request) {
	a, ok := s.assets[r.PathValue("name")]
	if !ok {
		http.NotFound(w, r)
		return
	}
	w.Header().Set("Content-Type", contentTypes[path.Ext(a.name)])
	if r.URL.Query().Get("v") == a.hash {
		w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
	} else {
		w.Header().Set("Cache-Control", "no-cache")
	}
	w.Header().Set("ETag", `"`+a.hash+`"`)
	http.ServeContent(w, r, a.name, time.Time{}, bytes.NewReader(a.body))
}
