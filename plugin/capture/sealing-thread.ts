// Entry of a sealing thread: frames of one capture worker come in order, and go back in order, compressed and checksummed.
import { parentPort } from 'node:worker_threads'
import { adaptiveZstd } from '../../core/record/index.ts'
import { sealParts } from './seal-parts.ts'
import type { SealingJob } from './seal-parts.ts'

const compressor = adaptiveZstd()
parentPort?.on('message', ({ seal, parts }: SealingJob) => {
  const { answer, transfer } = sealParts(seal, parts, compressor)
  parentPort?.postMessage(answer, transfer)
})
parentPort?.postMessage('ready')
