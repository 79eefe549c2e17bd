"""The course: exercises, and a judge that is itself tested with wrong answers.

Published graders of machine-learning exercises accept most wrong solutions, because nobody tries them with any. Here an
exercise comes with its known-wrong solutions (mutants: the mistakes that people really make), which every check must
reject, and with right solutions written differently (equivalents), which every check must accept. The same mutants then
tell a student what went wrong: an answer that equals a mutant's is explained by that mutant's misconception.

    exercises/eNN_name/   one folder an exercise: the page, the starter, the solution, the checks, the mutants
    spec  registry        what an exercise is; where exercises are found
    worker/               the child process: the only place where a student's code is run
    runner  judge         the parent: inputs -> child -> raw bytes -> comparison -> verdict
    compare  detect  diagnose   what is different, and what that usually means
    policy                what a submission may not import or call
    workspace  adapted  watch  keys   a student's folder, and checking at every save
    collect  marks  class_report  class_page   a class: what was handed in, the table, the report
    cli ...               the `minift-course` command

This room stands apart: it imports nothing else of minift, and a submission cannot import minift at all.
"""
