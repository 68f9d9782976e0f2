"""Human annotation of pairs of answers: questions, sessions, statistics, exchange with Label Studio."""
