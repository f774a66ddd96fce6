package attribution

// oldPollCalls are those that newer architectures do not have.
var oldPollCalls []int
