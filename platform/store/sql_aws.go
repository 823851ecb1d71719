package store

import "context"

func scanNodeAWS(r row) (*NodeAWS, error) {
	var v NodeAWS
	return &v, r.Scan(&v.Node, list[[]string]{&v.Accounts}, list[[]string]{&v.Principals})
}

func (t *sqlTx) PutNodeAWS(ctx context.Context, v *NodeAWS) error {
	return t.exec(ctx, true, `INSERT INTO node_aws (node, accounts, principals) VALUES (?, ?, ?)
		ON CONFLICT (node) DO UPDATE SET accounts = excluded.accounts, principals = excluded.principals`, v.Node, encode(v.Accounts), encode(v.Principals))
}

func (t *sqlTx) NodeAWS(ctx context.Context, node string) (*NodeAWS, error) {
	return one(ctx, t, scanNodeAWS, `SELECT node, accounts, principals FROM node_aws WHERE node = ?`, node)
}

func (t *sqlTx) DropNodeAWS(ctx context.Context, node string) error {
	return t.exec(ctx, false, `DELETE FROM node_aws WHERE node = ?`, node)
}
