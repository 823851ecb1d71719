package control

import (
	"time"

	"sallyway/internal/identity"
)

// How a node shows at enrolment who it is.
const (
	AuthToken = "token" // an enrolment token
	AuthAWS   = "aws"   // the AWS identity of its host
)

// AWSRule says which AWS identities may enrol a node. One of the lists is enough; of two, both must fit.
type AWSRule struct {
	Accounts []string `json:"accounts,omitempty" doc:"account ids of 12 digits"`
	// Principals are ARNs in which * stands for any text within a part. A role is arn:aws:iam::ACCOUNT:role/NAME, without its path.
	Principals []string `json:"principals,omitempty" doc:"ARNs of roles or users, with * as wildcard"`
}

// Headers that a node signs beside AWS's own, so that what it signed is good for one platform, one node, one key and one use. Names are in
// lower case, as in SigV4's list of signed headers.
const (
	AWSNonceHeader    = "x-sallyway-nonce"    // AWSChallenge.Nonce
	AWSPlatformHeader = "x-sallyway-platform" // URL of the platform that the node means
	AWSNodeHeader     = "x-sallyway-node"     // identity.Node
	AWSKeyHeader      = "x-sallyway-key"      // hash of the node's key
)

// AWSQuery is the body of the request that a node signs: a POST to the region's STS.
const AWSQuery = "Action=GetCallerIdentity&Version=2011-06-15"

// AWSContentType is the type of AWSQuery.
const AWSContentType = "application/x-www-form-urlencoded; charset=utf-8"

// AWSNonceLife is how long a nonce can be used, once.
const AWSNonceLife = 5 * time.Minute

// AWSChallengeRequest asks for a nonce. A name that does not exist gets one like any other.
type AWSChallengeRequest struct {
	Org  string        `json:"org"`
	Kind identity.Kind `json:"kind"`
	Name string        `json:"name"` // or id
}

// AWSChallenge is what to sign.
type AWSChallenge struct {
	Nonce    string        `json:"nonce"`
	Node     identity.Node `json:"node"`
	Endpoint string        `json:"endpoint"` // URL of the STS that the platform asks
	Region   string        `json:"region"`   // to sign for
	Expires  time.Time     `json:"expires"`
}

// AWSSigned is a signed request for sts:GetCallerIdentity with the body AWSQuery.
type AWSSigned struct {
	Endpoint string            `json:"endpoint"`
	Headers  map[string]string `json:"headers"` // names in lower case; without host
}

// AWSEnrolRequest is EnrolRequest with an AWS identity in the token's place.
type AWSEnrolRequest struct {
	Node    identity.Node `json:"node"`
	Signed  AWSSigned     `json:"signed"`
	CSR     string        `json:"csr"`
	SiteCSR string        `json:"site_csr,omitempty"`
	SSHCSR  string        `json:"ssh_csr,omitempty"`
	Version string        `json:"version"`
}

// AWSCheckRequest shows the AWS identity of an enrolled node again, at each of its starts.
type AWSCheckRequest struct {
	Signed AWSSigned `json:"signed"`
}

// Codes of refusals at enrolment by AWS.
const (
	CodeAWSRefused     = "aws_refused"     // the AWS identity may not enrol this node, or there is no such node
	CodeAWSBad         = "aws_bad"         // what was signed is not what was asked for, or STS does not take it
	CodeAWSUnavailable = "aws_unavailable" // STS does not answer the platform: try again
	CodeAWSNonce       = "aws_nonce"       // the nonce was used, is too old, or is not of this platform or node
)
