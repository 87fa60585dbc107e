// Has one worker thread of a process run a statement, through the process's inspector: node inspector-client.ts URL TITLE STATEMENT. A program of its own,
// because an inspector listens on the loopback of its own network namespace. Exit code 0: the thread was told; else the reason is on stderr.

type Message = { id?: number; method?: string; params?: { sessionId: string; message?: string; workerInfo?: { title: string } }; error?: { message: string } }

const [url, title, statement] = process.argv.slice(2)
const socket = new WebSocket(url)
const seen: string[] = []
const end = (problem?: string): void => {
  if (problem !== undefined) process.stderr.write(`${problem}\n`)
  process.exit(problem === undefined ? 0 : 1)
}
setTimeout(() => end(`no worker ${title} answers the inspector; there are: ${seen.join(', ')}`), 30_000)
socket.addEventListener('open', () => socket.send(JSON.stringify({ id: 1, method: 'NodeWorker.enable', params: { waitForDebuggerOnStart: false } })))
socket.addEventListener('error', () => end(`no inspector at ${url}`))
socket.addEventListener('message', ({ data }) => {
  const { method, params, error } = JSON.parse(String(data)) as Message
  if (error !== undefined) end(error.message)
  if (method === 'NodeWorker.attachedToWorker') {
    seen.push(params?.workerInfo?.title ?? '')
    if (params?.workerInfo?.title.includes(title) !== true) return
    const evaluate = { id: 1, method: 'Runtime.evaluate', params: { expression: `setTimeout(() => { ${statement} }, 0)` } }
    socket.send(JSON.stringify({ id: 2, method: 'NodeWorker.sendMessageToWorker', params: { sessionId: params.sessionId, message: JSON.stringify(evaluate) } }))
  }
  if (method === 'NodeWorker.receivedMessageFromWorker') end()
})
