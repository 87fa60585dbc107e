// Appends "passed failed skipped" of one jest run to the file named by CDP_TOTALS (scripts/test adds them up).
// A test file that fails to load is a failure: jest alone would count it as nothing.
import { appendFileSync } from 'node:fs'

export default class TotalsReporter {
  onRunComplete(_contexts, results) {
    const failed = results.numFailedTests + results.numRuntimeErrorTestSuites
    const skipped = results.numPendingTests + results.numTodoTests
    if (process.env.CDP_TOTALS) appendFileSync(process.env.CDP_TOTALS, `${results.numPassedTests} ${failed} ${skipped}\n`)
  }
}
