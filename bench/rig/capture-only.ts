// Worker thread: capture of one disk with an agent that keeps nothing.
import { parentPort, workerData } from 'node:worker_threads'
import { CaptureSession, GroupClock } from '../../plugin/capture/index.ts'
import { nullAgent } from './null-agent.ts'

const { targetPath, sizeBytes } = workerData as { targetPath: string; sizeBytes: number }
const session = new CaptureSession({
  vm: '100', vpg: 'bench', vms: ['100'], targetPath, disks: [{ disk: 0, key: 'scsi0', sizeBytes }], budgetBytes: 64 * 1024 * 1024, lingerMs: 10,
  slowAck: { p99Ms: Infinity, maxMs: Infinity }, clock: new GroupClock(), connect: async () => nullAgent(),
  emit: (event) => {
    if (event.is === 'letGo' || event.is === 'stats') parentPort?.postMessage(event)
  },
  nowUnixMs: Date.now, random: Math.random,
})
await session.start()
await session.open({ reason: 'bench', epoch: { reason: 'bench' } })
parentPort?.on('message', () => process.exit(0))
parentPort?.postMessage({ is: 'ready' })
