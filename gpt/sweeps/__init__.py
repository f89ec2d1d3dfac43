"""Many runs: planning, launching, leaderboard, prediction, report."""
