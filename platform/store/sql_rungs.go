package store

import "context"

func (t *sqlTx) PutRelayRungs(ctx context.Context, r *RelayRungs) error {
	return t.exec(ctx, true, `INSERT INTO relay_rungs (relay, ssh_port, tls_port) VALUES (?, ?, ?)
		ON CONFLICT (relay) DO UPDATE SET ssh_port = excluded.ssh_port, tls_port = excluded.tls_port`, r.Relay, r.SSHPort, r.TLSPort)
}

func (t *sqlTx) RelayRungs(ctx context.Context, org string) (map[string]*RelayRungs, error) {
	rows, err := many(ctx, t, func(r row) (*RelayRungs, error) {
		var v RelayRungs
		return &v, r.Scan(&v.Relay, &v.SSHPort, &v.TLSPort)
	}, `SELECT r.relay, r.ssh_port, r.tls_port FROM relay_rungs r JOIN nodes n ON n.id = r.relay WHERE n.org = ?`, org)
	out := make(map[string]*RelayRungs, len(rows))
	for _, v := range rows {
		out[v.Relay] = v
	}
	return out, err
}
