// Entry of a capture worker: one thread, one event loop, one VM.
import { parentPort, workerData } from 'node:worker_threads'
import { CdpError } from '../../core/errors/index.ts'
import { connectSecure, streamProtocol } from '../../core/link/index.ts'
import { CaptureSession, errorForMain } from './capture-session.ts'
import { GroupClock } from './group-clock.ts'
import type { CaptureWorkerData, FromWorker, ToWorker } from './messages.ts'

const BEAT_MS = 100
const TICK_MS = 1_000

const { agent, heartbeat, groupClock, ...options } = workerData as CaptureWorkerData
const main = parentPort
if (main === null) throw new CdpError('INTERNAL', 'the capture worker is not a worker thread')
const tell = (message: FromWorker): void => main.postMessage(message)

const session = new CaptureSession({
  ...options,
  clock: new GroupClock(groupClock),
  connect: (signal) => connectSecure({ ...agent, alpn: streamProtocol, signal }),
  emit: (event) => tell({ event }),
  nowUnixMs: Date.now,
  random: Math.random,
})

const answer = async (message: ToWorker): Promise<unknown> => {
  switch (message.name) {
    case 'open': return session.open(message.ask)
    case 'deliver': return session.deliver()
    case 'rejoin': return session.rejoin(message.ask)
    case 'sync': return session.sync(message.ask)
    case 'join': return session.join(message.ask)
    case 'endJoin': return session.endJoin(message.ask)
    case 'joined': return session.joined(message.ask)
    case 'inStep': return session.inStep()
    case 'compare': return session.compare(message.ask)
    case 'judge': return session.judge()
    case 'endCompare': return session.endCompare(message.ask)
    case 'cut': return session.cut(message.ask)
    case 'hold': return session.hold(message.ask)
    case 'commit': return session.commit(message.ask)
    case 'release': return session.release(message.ask)
    case 'proof': return session.proof(message.ask)
    case 'captured': return session.captured()
    case 'lastCaptured': return session.lastCaptured()
    case 'beginRound': return session.beginRound(message.ask)
    case 'endRound': return session.endRound(message.ask)
    case 'durable': return session.durable(message.ask)
    case 'restartCopy': return session.restartCopy()
    case 'letGo': return session.letGo(message.ask)
    case 'end': return session.end(message.ask)
  }
}
main.on('message', (message: ToWorker) => {
  answer(message).then(
    (value) => tell({ id: message.id, answer: value }),
    (error: unknown) => tell({ id: message.id, error: errorForMain(error) }),
  )
})

const beats = new Int32Array(heartbeat)
let expectedMs = performance.now() + BEAT_MS
let worstLateMs = 0
let sinceTickMs = 0
setInterval(() => {
  Atomics.add(beats, 0, 1)
  const nowMs = performance.now()
  worstLateMs = Math.max(worstLateMs, nowMs - expectedMs)
  expectedMs = nowMs + BEAT_MS
  sinceTickMs += BEAT_MS
  if (sinceTickMs < TICK_MS) return
  session.tick(worstLateMs)
  sinceTickMs = 0
  worstLateMs = 0
}, BEAT_MS)

await session.start()
tell({ listening: true })
