package admin

import (
	"github.com/spf13/cobra"

	"sallyway/internal/control"
	"sallyway/internal/daemon"
)

// awsFlags say how a relay or gateway shows at enrolment who it is.
type awsFlags struct {
	auth                 string
	accounts, principals []string
}

func (f *awsFlags) register(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.auth, "auth", control.AuthToken, "how its host shows at enrolment who it is: token, or aws: its AWS identity")
	cmd.Flags().StringSliceVar(&f.accounts, "aws-accounts", nil, "AWS accounts that may be it, with --auth aws")
	cmd.Flags().StringSliceVar(&f.principals, "aws-principals", nil, "AWS roles or users that may be it, * is a wildcard, such as arn:aws:iam::123456789012:role/relay-*")
}

// rule is who may, nil when no flag says it.
func (f *awsFlags) rule(cmd *cobra.Command) *control.AWSRule {
	if !cmd.Flags().Changed("aws-accounts") && !cmd.Flags().Changed("aws-principals") {
		return nil
	}
	return &control.AWSRule{Accounts: f.accounts, Principals: f.principals}
}

func (f *awsFlags) check() error {
	if f.auth != control.AuthToken && f.auth != control.AuthAWS {
		return daemon.Usagef("--auth %q: want token or aws", f.auth)
	}
	return nil
}

// create fills a request. A kind of node that has none of the flags changes nothing.
func (f *awsFlags) create(cmd *cobra.Command, req *control.CreateNode) error {
	if cmd.Flags().Lookup("auth") == nil {
		return nil
	}
	if err := f.check(); err != nil {
		return err
	}
	rule := f.rule(cmd)
	switch {
	case f.auth == control.AuthToken && rule != nil:
		return daemon.Usagef("--aws-accounts and --aws-principals go with --auth aws")
	case f.auth == control.AuthAWS && rule == nil:
		return daemon.Usagef("which AWS identities may be it? add --aws-accounts 123456789012, or --aws-principals arn:aws:iam::123456789012:role/NAME, or both")
	case f.auth == control.AuthAWS:
		req.Authentication, req.AWS = f.auth, rule
	}
	return nil
}

// update fills a request with what was named.
func (f *awsFlags) update(cmd *cobra.Command, u *control.UpdateNode) error {
	if cmd.Flags().Lookup("auth") == nil {
		return nil
	}
	if err := f.check(); err != nil {
		return err
	}
	if cmd.Flags().Changed("auth") {
		u.Authentication = &f.auth
	}
	u.AWS = f.rule(cmd)
	return nil
}
