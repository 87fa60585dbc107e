import { parentPort } from 'node:worker_threads'
import { toCdpError } from '../../core/errors/index.ts'
import { yieldToOthers } from '../../core/threads/index.ts'
import { mergeVm } from './merge-vm.ts'

// Worker thread of RunMerger: one job at a time, {vmDirectory, fanout} in, {report} or {error} out.

const port = parentPort
if (port !== null) {
  yieldToOthers()
  port.on('message', (job: { vmDirectory: string; fanout: number }) => {
    mergeVm(job.vmDirectory, job.fanout).then(
      (report) => port.postMessage({ report }),
      (error: unknown) => port.postMessage({ error: toCdpError(error).toJSON() }),
    )
  })
}
