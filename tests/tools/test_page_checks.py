"""Detection of pages without content, among short pages with content."""

import json

import pytest

from mmsr1_jax.tools.page_checks import missing_content

WITHOUT_CONTENT = [
    "", " \n\u200b", "...", "---\n* * *",
    "Just a moment...",
    "www.example.com\nJust a moment...\nVerifying you are human. This may take a few seconds.\n"
    "www.example.com needs to review the security of your connection before proceeding.\n"
    "Ray ID: 8f23ab\nPerformance & security by Cloudflare",
    "Checking your browser before accessing example.com.\nThis process is automatic. Your browser "
    "will redirect to your requested content shortly.\nDDoS protection by Cloudflare\nRay ID: 1",
    "Please enable JavaScript.", "You need to enable JavaScript to run this app.",
    "Enable JavaScript and cookies to continue", "Loading...",
    "Access Denied\nYou don't have permission to access \"http://www.x.com/\" on this server.\n"
    "Reference #18.4f2",
    "Attention Required! | Cloudflare\nSorry, you have been blocked\nYou are unable to access "
    "example.com\nThis website is using a security service to protect itself from online attacks.",
    "Before you continue to Google\nWe use cookies and data to\nDeliver and maintain services\n"
    "Track outages and protect against spam, fraud, and abuse\nAccept all\nReject all",
    "We value your privacy\nWe and our 843 partners store and/or access information on a device, "
    "such as cookies and process personal data, such as unique identifiers.\nAccept all",
    "This website uses cookies to improve your experience. Accept",
    "403 Forbidden\nnginx", "404 Not Found", "502 Bad Gateway",
    "Page not found\nThe page you are looking for does not exist.",
    "Our systems have detected unusual traffic from your computer network. Please try again later.",
    "Pardon Our Interruption\nSomething about your browser made us think you were a bot.",
    "Request unsuccessful. Incapsula incident ID: 877000680",
    "Are you a robot?\nPlease click the box below to let us know you're not a robot.",
    "Robot or human?\nActivate and hold the button to confirm that you're human. Thank You!",
    "请完成安全验证", "请稍候…", "しばらくお待ちください", "로봇이 아닙니다", "Nur einen Moment…",
    "Un instant…", "Подтвердите, что вы не робот", "Bitte aktivieren Sie JavaScript",
    "Too many requests", "You are being rate limited", "Error 1020", "Account suspended",
    "Error 1020\nYou are being rate limited by the owner of this website.",
    "This account has been suspended.\nContact your hosting provider for more information.",
    "Please enable JS and disable any ad blocker", "Sorry, something went wrong.",
    "Oops! Something went wrong", "Slide to verify", "Client Challenge",
    "The requested URL was rejected. Please consult with your administrator.",
    "Forbidden", "Forbidden\nnginx/1.18.0", "Access denied", "CAPTCHA verification required",
    "Not Found\nThe requested URL was not found on this server.\nServer at x.org Port 80",
    "Wir verwenden Cookies, um Ihnen die bestmögliche Nutzung unserer Website zu ermöglichen.\n"
    "Alle akzeptieren\nAblehnen\nMehr erfahren",
    "Diese Website verwendet Cookies. Durch die weitere Nutzung stimmen Sie dem zu.",
    "Nous utilisons des cookies pour améliorer votre expérience.\nTout accepter\nTout refuser",
    "Ce site utilise des cookies. En poursuivant votre navigation, vous acceptez leur utilisation.",
    "Utilizamos cookies propias y de terceros para mejorar nuestros servicios.\nAceptar todas\n"
    "Rechazar\nConfigurar",
    "Мы используем файлы cookie для вашего удобства.\n" "Принять",
    "Наш сайт использует куки. Продолжая работу, вы соглашаетесь \u0441 этим. Понятно",
    "JavaScriptを有効にしてください", "このサイトではJavaScriptが必要です。", "请启用JavaScript",
    "您需要启用 JavaScript 才能运行此应用。", "請啟用 JavaScript", "访问过于频繁", "滑动验证",
    "HTTP 429",
    "访问过于频繁\n请稍后再试", "Vérification de sécurité en cours",
    "![Image 1: logo](https://x.org/logo.png)\n\n![Image 2](https://x.org/b.png)",
    "[](https://x.org/)",
]  # fmt: skip
WITH_CONTENT = [
    "The tower was built in 1932.", "莲花塔建于1932年", "탑은 1932년에 세워졌다", "หอคอยบัวสร้าง",
    "ok", "1886", "12 34", "2 + 2 = 4",
    "CAPTCHA verification was invented in 2000 at Carnegie Mellon University by a team of four.",
    "Forbidden\nA novel by X, published 2010", "access denied (album) is a 2001 album by a band.",
    "Not Found\nA 2007 film from Norway about a lost dog.",
    "Slide to Unlock is a 2012 song by a band.", "Access was denied to journalists in 1990.",
    "Account Suspended is a 2015 film.", "Too Many Requests is a 2014 album by the band.",
    "Something Went Wrong is a song by a Danish band, released in 1990.",
    "Cookies sind kleine Textdateien, die ein Server im Browser speichert.",
    "Les cookies sont de petits fichiers que le navigateur garde.",
    "JavaScript 是一种编程语言\n1995年由布兰登·艾克创建。",
    "Please enable JavaScript. The tower of Porto was built in 1932 by Miller.",
    "This site uses cookies. Accept\nThe bridge opened in 1886 and crosses the Douro.",
    "Cloudflare, Inc. is an American company that provides content delivery network services.",
    "A CAPTCHA is a type of challenge-response test that tells humans from bots.",
    "Just a Moment is a 1979 album by the Danish pianist, recorded in Copenhagen with a trio.",
    "404 is a natural number following 403 and preceding 405.",
    "HTTP cookies are small blocks of data created by a web server.",
    "JavaScript is a programming language created by Brendan Eich at Netscape.",
    "[The Dom Luis bridge](https://x.org/bridge)",
    "Just a moment...\n" + "The bridge was opened in 1886 by the king. " * 10,
    "Accept all cookies.\n" * 300 + "The bridge was opened in 1886.",
]  # fmt: skip


@pytest.mark.parametrize("page", WITHOUT_CONTENT)
def test_pages_without_content_are_detected(page):
    assert missing_content(page)


@pytest.mark.parametrize("page", WITH_CONTENT)
def test_pages_with_content_pass(page):
    assert missing_content(page) is None


def test_all_recorded_pages_pass(shared):
    lines = (shared / "data" / "web_pages.jsonl").read_text(encoding="utf-8").splitlines()
    for page in map(json.loads, lines):
        for text in (page["snippet"], page["summary"]):
            assert not text or missing_content(text) is None, text
