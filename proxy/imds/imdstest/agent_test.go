package imdstest_test

import (
	"strings"
	"testing"

	"github.com/imdsgate/imdsgate/proxy/imds/imdstest"
)

func TestAgent(t *testing.T) {
	_, ecs := serve(t, imdstest.Config{Agent: &imdstest.Agent{Task: "0f0e"}})
	_, eks := serve(t, imdstest.Config{Agent: &imdstest.Agent{PodToken: "jwt"}})
	for _, c := range []struct {
		addr, request string
		status, has   string
	}{
		{ecs, get("/v2/credentials/0f0e"), "200", `"RoleArn":`},
		{ecs, get("/v2/credentials/0f0f"), "400", "InvalidIdInRequest"},
		{ecs, get("/v2/credentials"), "400", "InvalidIdInRequest"},
		{ecs, get("/v4/0f0e/task"), "200", `"Cluster":`},
		{ecs, get("/v1/credentials"), "404", ""},
		{ecs, "PUT /latest/api/token HTTP/1.1\r\n\r\n", "405", ""},
		{eks, "GET /v1/credentials HTTP/1.1\r\nAuthorization: jwt\r\n\r\n", "200", `"AccessKeyId":"ASIAEXAMPLEFAKE80001"`},
		{eks, "GET /v1/credentials HTTP/1.1\r\nAuthorization: other\r\n\r\n", "400", ""},
		{eks, get("/v1/credentials"), "400", ""},
		{eks, get("/v2/credentials/0f0e"), "404", ""},
	} {
		answer := ask(t, c.addr, c.request)
		if !strings.HasPrefix(answer, "HTTP/1.1 "+c.status+" ") || !strings.Contains(body(answer), c.has) || strings.Contains(answer, "EC2ws") ||
			!strings.Contains(answer, "\r\nContent-Type: application/json\r\n") {
			t.Errorf("%q got %q", c.request, answer)
		}
	}
}
