package vm

import "testing"

func TestBoots(t *testing.T) {
	m := boot(t)
	t.Log(m.do("uname", "-a"))
	t.Log(m.do("systemctl", "--failed"))
	t.Log(m.do("imdsgate", "status"))
	t.Log(m.try("imdsgate", "doctor"))
}
