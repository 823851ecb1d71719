package api

import (
	"cmp"
	"net/http"
	"slices"
	"strings"

	"github.com/danielgtaylor/huma/v2"

	"sallyway/internal/control"
	"sallyway/platform/people"
	"sallyway/platform/registry"
)

// Code is a stable code of problems. What a program branches on are codes and statuses; texts may change.
type Code struct {
	Code   string
	Status []int  // with which it comes
	By     string // who is answered so: byAPI, byNode, byLogin, or byPage, whom the API never answers so
	About  string
}

// Who is answered with a code; several are separated by a space.
const (
	byAPI   = "api"   // callers with a token or a session
	byNode  = "node"  // relays, gateways, clients
	byLogin = "login" // programs that log a person in
	byPage  = "page"  // browsers
)

// Codes are all codes. docs/api.md has the same table, and a test that no code of the sources is missing.
var Codes = []Code{
	{control.CodeInvalid, []int{400, 413, 422}, "api node login", "the request does not make sense; `errors` say where"},
	{control.CodeTokenUnknown, []int{401, 403}, "api node", "the token was never issued, or a newer one replaced it"},
	{control.CodeTokenExpired, []int{401, 403}, "api node", "the token is too old"},
	{people.CodeNoSession, []int{401}, "api page", "the browser's session is over"},
	{control.CodeForbidden, []int{403}, "api", "the caller may not do this"},
	{people.CodeReadOnly, []int{403}, "api", "the credential may read and not change"},
	{people.CodeScope, []int{403}, "api", "the credential's scopes do not cover this"},
	{people.CodeOtherAccount, []int{403}, "api", "the account is managed by another organization"},
	{control.CodeLicenceLimit, []int{403, 409}, "api", "the organization's licence does not cover more"},
	{registry.CodeSwitchedOff, []int{403}, "api", "the organization does not let the platform dial its gateways"},
	{people.CodeBadLogin, []int{403}, "api page", "login or password is wrong"},
	{people.CodeBadCode, []int{403}, "page", "the code of the second factor is wrong"},
	{people.CodeTicketGone, []int{403}, "page", "an invitation, or a login between two steps, that is used or too old"},
	{people.CodeBadSetup, []int{403}, "page", "the setup code of the first owner is wrong"},
	{people.CodeBadAnswer, []int{403}, "page", "what the provider of single sign-on sent back is not of this login"},
	{people.CodeNoAccount, []int{403}, "page", "nobody here is known under that identity"},
	{people.CodeNoRole, []int{403}, "page", "no rule gives the identity a role"},
	{people.CodeUnverified, []int{403}, "page", "the provider does not say that the e-mail address is verified"},
	{people.CodeProvider, []int{403, 502}, "api page", "the provider of single sign-on can not be reached, or said no"},
	{control.CodeNotFound, []int{404}, "api node", "there is no such object, or the caller does not see its organization"},
	{control.CodeConflict, []int{409}, "api node", "the name is taken, or something still uses the object; for a node: it has opened a newer control stream"},
	{people.CodeNotFirst, []int{409}, "page", "the platform has its first owner already"},
	{people.CodeNoPassword, []int{409}, "page", "the account has no password"},
	{CodeInProgress, []int{409}, "api", "the first request with this Idempotency-Key is being carried out: try again"},
	{CodeAnswerLost, []int{409}, "api", "the first request with this Idempotency-Key was carried out, and its answer was lost"},
	{CodeKeyReused, []int{422}, "api", "this Idempotency-Key came with another request before"},
	{CodePrecondition, []int{412}, "api", "the object was changed since it was read: If-Match does not fit"},
	{control.CodeRateLimited, []int{429}, "api node login", "too many requests, or too many refused ones: wait as Retry-After says"},
	{CodeUnavailable, []int{503}, "api node login", "the platform's database can not be used: try again"},
	{control.CodeTokenUsed, []int{403}, "node", "the enrolment token was used before"},
	{control.CodeNodeDisabled, []int{403, 409}, "node api", "the node is disabled until it is enabled again"},
	{control.CodeNodeRevoked, []int{403, 409}, "node api", "the node's key is denied; a new token gives it a new one"},
	{control.CodeNodeUnknown, []int{403}, "node", "the node was deleted, or is another platform's"},
	{control.CodeNotEnrolled, []int{401}, "node", "the node has never enrolled"},
	{control.CodeBadAssertion, []int{401}, "node", "signature, audience or time of the node's assertion"},
	{control.CodeWrongAudience, []int{401, 403}, "node", "the token or assertion is for another platform or kind of node"},
	{registry.CodeWrongKind, []int{403}, "node", "the token is for another kind of node"},
	{registry.CodeWrongNode, []int{403}, "node", "the token is for another node"},
	{registry.CodeBadRequest, []int{422}, "node", "the certificate request is not acceptable"},
	{registry.CodeKeyDenied, []int{401, 403}, "node", "the key is revoked, or the node enrolled anew with another"},
	{registry.CodeKeyInUse, []int{403}, "node", "the key belongs to another node"},
	{registry.CodeNotAWS, []int{403}, "node", "the node does not enrol by AWS, or this platform does not"},
	{control.CodeAWSRefused, []int{403}, "node", "the AWS identity may not enrol this node, or there is no such node"},
	{control.CodeAWSBad, []int{403}, "node", "what was signed is not what was asked for, or STS does not take it"},
	{control.CodeAWSNonce, []int{403}, "node", "the nonce was used, is too old, or is not of this platform or node"},
	{control.CodeAWSUnavailable, []int{503}, "node", "STS does not answer the platform: try again"},
	{control.CodePending, []int{400}, "login", "the login was not approved yet: ask again"},
	{control.CodeSlowDown, []int{400}, "login", "ask less often"},
	{control.CodeDenied, []int{400}, "login", "the login was refused"},
	{control.CodeExpired, []int{400}, "login", "the login took too long"},
	{control.CodeBadGrant, []int{400}, "login", "the code is not one of a login that was approved"},
}

// by is who calls an operation.
func by(op *huma.Operation) string {
	switch {
	case op.Metadata[public] != nil:
		return byLogin
	case op.DefaultStatus == 0:
		return byNode
	}
	return byAPI
}

// problemsOf words an error's description with the codes that come with its status; 0 is any.
func problemsOf(op *huma.Operation, status int) string {
	var names []string
	for _, c := range Codes {
		switch {
		case status != 0 && !slices.Contains(c.Status, status), !slices.Contains(strings.Fields(c.By), by(op)):
		case strings.HasPrefix(c.Code, "idempotency_") && !keyed(op), c.Code == CodePrecondition && !guarded(op):
		default:
			names = append(names, "`"+c.Code+"`")
		}
	}
	text := cmp.Or(http.StatusText(status), "Error")
	if len(names) > 0 {
		text += ". Codes: " + strings.Join(names, ", ")
	}
	return text
}
