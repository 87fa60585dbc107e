// Serves recovery points of given directories, a process of its own as the agent is: opens on request, tells times and memory.
import { errorMessage } from '../../core/errors/index.ts'
import { SegmentSealer, VmStore } from '../../agent/journal/index.ts'
import { PinRegistry, PointServer } from '../../agent/recovery/index.ts'
import { silentLogger } from '../../core/log/index.ts'

export type PointRequest =
  | { do: 'open'; pointId: string; vm: string; vmDirectory: string; seq: number }
  | { do: 'close'; pointId: string }
  /** Opens and closes the store, as the agent does when it starts. */
  | { do: 'openStore'; vm: string; vmDirectory: string }
export type PointAnswer = { id: number; tookMs: number; uri: string; residentBytes: number; journalIndexBytes: number; sealedRecords: number } | { id: number; error: string } | { ready: true }

const tell = (message: PointAnswer): void => void process.send?.(message)
const server = await PointServer.listen({ socketPath: process.argv[2], pageCacheBytes: 64 * 2 ** 20, frameCacheBytes: 64 * 2 ** 20, pins: new PinRegistry() })

const answer = async (request: PointRequest): Promise<{ uri?: string; journalIndexBytes?: number; sealedRecords?: number }> => {
  switch (request.do) {
    case 'open': {
      const { pointId, vm, vmDirectory, seq } = request
      const { disks } = await server.openPoint({ pointId, vms: [{ vm, vmDirectory, seq }] })
      return { uri: disks[0].uri }
    }
    case 'close':
      await server.closePoint(request.pointId)
      return {}
    case 'openStore': {
      await using sealer = new SegmentSealer()
      await using store = await VmStore.open({ directory: request.vmDirectory, vm: request.vm, log: silentLogger, clock: { nowUnixMs: Date.now }, sealer })
      const sealed = store.segments.filter((segment) => segment.sealed)
      return { journalIndexBytes: sealed.reduce((sum, { runBytes }) => sum + runBytes, 0), sealedRecords: sealed.reduce((sum, { recordCount }) => sum + recordCount, 0) }
    }
  }
}

process.on('message', (request: PointRequest & { id: number }) => {
  const startedMs = performance.now()
  answer(request).then(
    ({ uri = '', journalIndexBytes = 0, sealedRecords = 0 }) =>
      tell({ id: request.id, tookMs: performance.now() - startedMs, uri, residentBytes: process.memoryUsage.rss(), journalIndexBytes, sealedRecords }),
    (error: unknown) => tell({ id: request.id, error: errorMessage(error) }),
  )
})
process.on('SIGINT', () => undefined)
process.once('disconnect', () => process.exit(0))
tell({ ready: true })
