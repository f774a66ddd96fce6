package imdstest

import (
	"fmt"
	"strings"
	"time"
)

// Agent makes the Server one of those that give containers the credentials of their own roles (ECS Developer Guide,
// "Task IAM role" and "Task metadata endpoint version 4"; EKS User Guide, "EKS Pod Identity"). Both are Go programs and
// answer as package net/http does: with JSON, and on kept connections if Config.Persistence is AlwaysKeep.
type Agent struct {
	// Task is the UUID of AWS_CONTAINER_CREDENTIALS_RELATIVE_URI: who names it gets the credentials of the task. ""
	// is an agent that is not of ECS.
	Task string

	// PodToken is what a pod of EKS has in the file AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE and sends as Authorization;
	// "" is an agent that is not of EKS.
	PodToken string
}

// agentAnswer says what an agent does with a request.
func (i *instance) agentAnswer(r *Request, now time.Time) answer {
	a := answer{status: 200, json: true, headOnly: r.Method == "HEAD"}
	given, _ := r.Header("Authorization")
	expires := stamp(now.Add(i.CredentialLifetime))
	switch path, _, _ := strings.Cut(r.Target, "?"); {
	case r.Method != "GET" && r.Method != "HEAD":
		a.status, a.body = 405, []byte(`{"code":"MethodNotAllowed"}`)
	case i.Agent.Task != "" && path == "/v2/credentials/"+i.Agent.Task:
		a.body = fmt.Appendf(nil, `{"RoleArn":"arn:aws:iam::%s:role/imdsgate-lab-task",%s,"Expiration":%q}`, accountID, agentKeys(70000+i.issue), expires)
	case i.Agent.Task != "" && strings.HasPrefix(path, "/v2/credentials"):
		a.status, a.body = 400, []byte(`{"code":"InvalidIdInRequest","message":"CredentialsV2Request: ID not found","HTTPErrorCode":400}`)
	case i.Agent.Task != "" && strings.HasPrefix(path, "/v4/") && strings.HasSuffix(path, "/task"):
		a.body = []byte(`{"Cluster":"imdsgate-lab","Family":"imdsgate-lab","Revision":"1","DesiredStatus":"RUNNING","Containers":[]}`)
	case i.Agent.PodToken != "" && path == "/v1/credentials" && given == i.Agent.PodToken:
		a.body = fmt.Appendf(nil, `{%s,"AccountId":%q,"Expiration":%q}`, agentKeys(80000+i.issue), accountID, expires)
	case i.Agent.PodToken != "" && path == "/v1/credentials":
		a.status, a.body = 400, []byte(`{"message":"Service account token cannot be empty or is not valid"}`)
	default:
		a.status, a.body = 404, []byte("404 page not found\n")
	}
	return a
}

// agentKeys are the members of a document that sign requests.
func agentKeys(number int) string {
	return fmt.Sprintf(`"AccessKeyId":"ASIAEXAMPLEFAKE%05d","SecretAccessKey":%q,"Token":%q`, number,
		fmt.Sprintf("fake-secret-access-key-%05d-of-no-account", number)[:40],
		fmt.Sprintf("fake-session-token-%05d-", number)+strings.Repeat("FAKE", 256))
}
