package awsauth

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"sallyway/internal/control"
)

// maxEntries bounds each list of a rule.
const maxEntries = 64

var (
	validPattern   = regexp.MustCompile(`^arn:([a-z*-]{1,20}):(iam|sts)::([0-9*]{1,12}):([!-~]{1,600})$`)
	patternSubject = regexp.MustCompile(`^(user|role|assumed-role|federated-user)/.|^root$`)
)

// CheckRule refuses a rule that fits nobody, or people it can not mean.
func CheckRule(r *control.AWSRule) error {
	if r == nil || len(r.Accounts)+len(r.Principals) == 0 {
		return fmt.Errorf("no AWS account and no principal is named: nobody could enrol")
	}
	if len(r.Accounts) > maxEntries || len(r.Principals) > maxEntries {
		return fmt.Errorf("more than %d AWS accounts or principals", maxEntries)
	}
	for _, a := range r.Accounts {
		if !validAccount.MatchString(a) {
			return fmt.Errorf("AWS account %.40q is not 12 digits", a)
		}
	}
	for _, p := range r.Principals {
		m := validPattern.FindStringSubmatch(p)
		switch {
		case m == nil || !patternSubject.MatchString(m[4]):
			return fmt.Errorf("AWS principal %.80q is not an ARN such as arn:aws:iam::123456789012:role/gateway-*", p)
		case m[2] == "iam" && (strings.HasPrefix(m[4], "assumed-role/") || strings.HasPrefix(m[4], "federated-user/")):
			return fmt.Errorf("AWS principal %.80q: sessions are arn:aws:sts::…, roles arn:aws:iam::ACCOUNT:role/NAME", p)
		case m[2] == "sts" && !strings.HasPrefix(m[4], "assumed-role/") && !strings.HasPrefix(m[4], "federated-user/"):
			return fmt.Errorf("AWS principal %.80q: roles and users are arn:aws:iam::…", p)
		case m[2] == "iam" && strings.HasPrefix(m[4], "role/") && strings.Count(m[4], "/") > 1:
			return fmt.Errorf("AWS principal %.80q: AWS does not tell a role's path, write role/NAME", p)
		case !validAccount.MatchString(m[3]) && len(r.Accounts) == 0:
			return fmt.Errorf("AWS principal %.80q: anybody can make one of that name in an account of their own; name the account in it, or the accounts beside it", p)
		}
	}
	return nil
}

// Principal is an identity's ARN with a role in place of its session: arn:aws:sts::A:assumed-role/R/S is arn:aws:iam::A:role/R.
func (id *Identity) Principal() string {
	m := validARN.FindStringSubmatch(id.ARN)
	if m == nil || m[2] != "sts" {
		return id.ARN
	}
	rest, session := strings.CutPrefix(m[4], "assumed-role/")
	role, _, two := strings.Cut(rest, "/")
	if !session || !two || role == "" {
		return id.ARN
	}
	return "arn:" + m[1] + ":iam::" + m[3] + ":role/" + role
}

// Allow says whether a rule allows an identity, and why not.
func Allow(r *control.AWSRule, id *Identity) error {
	if err := CheckRule(r); err != nil {
		return err
	}
	if len(r.Accounts) > 0 && !slices.Contains(r.Accounts, id.Account) {
		return fmt.Errorf("account %s is not among those that may", id.Account)
	}
	fits := func(p string) bool { return match(p, id.ARN) || match(p, id.Principal()) }
	if len(r.Principals) > 0 && !slices.ContainsFunc(r.Principals, fits) {
		return fmt.Errorf("%s is not among the principals that may", id.Principal())
	}
	return nil
}

// arnParts is how many parts an ARN has: arn, partition, service, region, account, and the rest, in which colons are text.
const arnParts = 6

// match holds an ARN against a pattern part by part, so that no wildcard reaches over a colon into another account.
func match(pattern, arn string) bool {
	ps, as := strings.SplitN(pattern, ":", arnParts), strings.SplitN(arn, ":", arnParts)
	if len(ps) != arnParts || len(as) != arnParts {
		return false
	}
	for i := range ps {
		if !wild(ps[i], as[i]) {
			return false
		}
	}
	return true
}

// wild matches text against a pattern in which * is any text, in time linear in the number of stars times the text.
func wild(pattern, text string) bool {
	parts := strings.Split(pattern, "*")
	if len(parts) == 1 {
		return pattern == text
	}
	text, ok := strings.CutPrefix(text, parts[0])
	if !ok {
		return false
	}
	for _, p := range parts[1 : len(parts)-1] {
		_, after, found := strings.Cut(text, p)
		if !found {
			return false
		}
		text = after
	}
	return strings.HasSuffix(text, parts[len(parts)-1])
}
